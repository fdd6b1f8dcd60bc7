"""Three training steps of a tiny student and teacher give the losses in this file, on any CPU."""

import jax
import jax.numpy as jnp
import numpy as np

from distill.models.config import AttentionConfig, DecoderConfig, LayerConfig, MlpConfig, RopeConfig
from distill.models.decoder import Decoder
from distill.objectives.cross_entropy import CrossEntropy
from distill.objectives.divergence_terms import ForwardKl
from distill.objectives.objective import initial_states
from distill.parallel.mesh import make_mesh, replicated
from distill.schedules import CosineScheduleConfig
from distill.teachers.live import LiveTeacher
from distill.training.config import OptimizerConfig
from distill.training.optimizer import make_optimizer
from distill.training.step import StepConfig, TrainState, canonical_names, make_step
from distill.types import Batch

GOLDEN = (2.9503002, 2.4966497, 2.3170018)
ROWS, LENGTH, VOCAB, WIDTH, MLP, STEPS = 8, 12, 31, 16, 24, 3
# Sequential roundings from a weight to the loss: sums over a layer's width (projections in and out, two norms), over
# heads and positions, and over its MLP; then over the head, the vocabulary and the tokens. Student and teacher have two
# layers each. A float32 rounds by 2^-24, and the roundings of three steps add up.
ROUNDINGS = 2 * 2 * (4 * WIDTH + 8 + LENGTH + MLP) + WIDTH + VOCAB + ROWS * LENGTH
TOLERANCE = STEPS * ROUNDINGS * 2.0**-24
HOW = f"""
The losses of three steps are no longer those in tests/training/golden_step_test.py, beyond rounding (relative
{TOLERANCE:.1e}). A change to initial weights, to a loss, to the optimizer or to the models changes them rightfully; a
refactoring, another sharding or another order of sums does not. If the change is meant, replace GOLDEN by the losses
above and say in the commit why they changed.
"""


def layer(mixer):
  return LayerConfig(mixer=mixer, mlp=MlpConfig(width=MLP))


def decoder(*mixers):
  return Decoder(DecoderConfig(family="llama", vocab_size=VOCAB, width=WIDTH, layers=tuple(map(layer, mixers))))


def batch():
  """Returns rows of two documents and padding."""
  tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
  segments = np.repeat([[1, 2, 0]], [5, 5, 2], axis=1).repeat(ROWS, 0).astype(np.int32)
  positions = np.tile(np.asarray([*range(5), *range(5), 0, 0], np.int32), (ROWS, 1))
  mask = np.tile(np.asarray([1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0], np.float32), (ROWS, 1))
  return Batch(tokens=tokens, segments=segments, positions=positions, loss_mask=mask)


def test_three_training_steps_of_a_tiny_student_give_the_committed_losses():
  attention = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, rope=RopeConfig(theta=1e4))
  student, model, mesh = decoder(attention, attention), decoder(attention, attention), make_mesh()
  teacher = LiveTeacher(decoder=model, params=model.init(jax.random.key(1)))
  terms = (ForwardKl(), CrossEntropy(weight=0.5))
  params = {f"student.{name}": x for name, x in student.init(jax.random.key(0)).items()}
  optimizer = make_optimizer(
    OptimizerConfig(learning_rate=CosineScheduleConfig(peak=1e-2), weight_decay=0.1),
    factors=dict.fromkeys(params, 1.0),
    names=canonical_names(student, params),
    key="optimizer",
    steps=STEPS,
  )
  state = TrainState(
    trained=params,
    frozen={},
    optimizer=optimizer.init(params),
    step=jnp.zeros((), jnp.int32),
    terms=initial_states(terms),
  )
  state, teacher_params = jax.device_put((state, dict(teacher.params)), replicated(mesh))
  step = make_step(
    student,
    teacher=teacher,
    optimizer=optimizer,
    mesh=mesh,
    state_shardings=jax.tree.map(lambda x: x.sharding, state),
    config=StepConfig(terms=terms, steps=STEPS, dtype=jnp.float32),
  )
  losses = []
  for _ in range(STEPS):
    state, metrics = step(state, teacher_params, batch())
    losses.append(float(metrics["loss"]))
  print(f"losses: {tuple(losses)}")
  # The steps differ by far more than the tolerance, so that a missing update shows.
  assert losses[0] - losses[1] > 100 * TOLERANCE < losses[1] - losses[2]
  np.testing.assert_allclose(losses, GOLDEN, rtol=TOLERANCE, err_msg=HOW)
