"""Trains tiny models on loss terms with the library's training step, without files or a loop."""

import jax
import jax.numpy as jnp
import numpy as np

from distill.models.config import AttentionConfig, DecoderConfig, GatedDeltaConfig, LayerConfig, MlpConfig, RopeConfig
from distill.models.decoder import Decoder
from distill.objectives.objective import initial_states
from distill.parallel.mesh import make_mesh
from distill.training.config import OptimizerConfig
from distill.training.optimizer import make_optimizer, multipliers
from distill.training.step import StepConfig, TrainState, canonical_names, make_step
from distill.types import Batch

MLP = MlpConfig(width=24)
SOFT = LayerConfig(mixer=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, rope=RopeConfig(theta=1e4)), mlp=MLP)
DELTA = LayerConfig(
  mixer=GatedDeltaConfig(num_key_heads=2, num_value_heads=2, key_head_dim=8, value_head_dim=8), mlp=MLP
)


def decoder(*layers, **changes):
  return Decoder(DecoderConfig(family="llama", vocab_size=31, width=16, layers=layers, **changes))


def batch(rows=2):
  rng = np.random.default_rng(0)
  segments = jnp.asarray(np.repeat([[1, 2, 0]], [7, 6, 2], axis=1).repeat(rows, 0))
  positions = jnp.asarray(np.concatenate([np.arange(7), np.arange(6), np.arange(2)])[None].repeat(rows, 0))
  mask = jnp.asarray((np.asarray(segments) > 0).astype(np.float32))
  tokens = jnp.asarray(rng.integers(0, 31, segments.shape))
  return Batch(tokens=tokens, segments=segments, positions=positions, loss_mask=mask)


def trained(student, params, *, terms, teacher, steps, train=((".*", 1.0),)):
  """Returns (parameters after `steps` steps on one batch, loss of each step)."""
  mesh = make_mesh()
  names = canonical_names(student, params)
  factors = multipliers(train, names=names, what="train")
  mine = {name: x for name, x in params.items() if np.any(factors[name])}
  factors = {name: factors[name] for name in mine}
  optimizer = make_optimizer(
    OptimizerConfig(learning_rate=1e-2),
    factors=factors,
    names={name: names[name] for name in mine},
    key="optimizer",
    steps=steps,
  )
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  state = TrainState(
    trained=mine,
    frozen={name: x for name, x in params.items() if name not in mine},
    optimizer=optimizer.init(mine),
    step=jnp.zeros((), jnp.int32),
    terms=initial_states(terms),
  )
  state = jax.device_put(jax.tree.map(np.array, state), everywhere)
  shardings = jax.tree.map(lambda x: x.sharding, state)
  config = StepConfig(terms=terms, steps=steps, dtype=jnp.float32)
  step = make_step(student, teacher=teacher, optimizer=optimizer, mesh=mesh, state_shardings=shardings, config=config)
  given, losses = batch(8), []
  teacher_params = jax.device_put(dict(teacher.params), everywhere)
  for _ in range(steps):
    state, metrics = step(state, teacher_params, given)
    losses.append(float(metrics["loss"]))
  return state.params, losses
