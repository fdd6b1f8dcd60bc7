"""Tiny teachers and students for tests of initialisation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from distill.initialise.importance import measure_importance
from distill.initialise.transfer import from_teacher, needs_importance
from distill.models.config import AttentionConfig, DecoderConfig, LayerConfig, MlpConfig, RopeConfig
from distill.models.decoder import Decoder
from distill.parallel.mesh import make_mesh
from distill.types import Batch
from tests.kernels.precision import assert_equal_up_to_rounding

MLP = MlpConfig(width=24)
LAYER = LayerConfig(mixer=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, rope=RopeConfig()), mlp=MLP)
TEACHER = DecoderConfig(family="llama", vocab_size=31, width=16, layers=(LAYER,) * 3, tie_embeddings=True)
# Behind a logit are three layers of sums over the width, the heads and the neurons; eight times that as headroom.
ROUNDINGS = 8 * 3 * (16 + 32 + 24)


def with_mixer(**changes):
  """Returns the teacher's layer with changed attention."""
  return dataclasses.replace(LAYER, mixer=dataclasses.replace(LAYER.mixer, **changes))


def logits(config, params):
  """Returns a model's logits for a fixed row of eight tokens."""
  decoder = Decoder(config)
  tokens = jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6]])
  rows = {"tokens": tokens, "segments": jnp.ones_like(tokens), "positions": jnp.arange(8)[None]}

  @jax.jit
  def run(params):
    output = decoder.apply(params, **rows, dtype=jnp.float32)
    return output.readout.logits(output.hidden)

  return run(decoder.stack(params))


def random(config, seed):
  """Returns canonical parameters, each moved away from its initial value."""
  decoder = Decoder(config)
  key = jax.random.key(seed)
  params = {name: x + 0.1 * jax.random.normal(key, x.shape) for name, x in decoder.init(key).items()}
  return decoder.unstack(jax.device_get(params))


def measured(config, params):
  """Returns the importance of a model's parts, measured on eight random rows."""
  decoder, mesh = Decoder(config), make_mesh()
  tokens = np.random.default_rng(5).integers(0, config.vocab_size, (8, 12)).astype(np.int32)
  segments = np.ones_like(tokens)
  segments[::2, 9:] = 0
  positions = np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape)
  batch = Batch(tokens=tokens, segments=segments, positions=positions, loss_mask=np.ones(tokens.shape, np.float32))
  stacked = {name: jax.device_put(x, decoder.shardings(mesh)[name]) for name, x in decoder.stack(params).items()}
  return measure_importance(decoder, stacked, batches=[batch], mesh=mesh)


def start(teacher_config, teacher, config, layers=(0, 1, 2)):
  """Initialises a student of `config`; importance is measured only if it is needed."""
  needed = needs_importance(config, teacher=teacher_config, layers=layers)
  return from_teacher(
    random(config, 1),
    config=config,
    teacher=teacher,
    teacher_config=teacher_config,
    layers=layers,
    importance=measured(teacher_config, teacher) if needed else None,
  )


def assert_equal_logits(config, params, teacher_config, teacher):
  """Asserts that a student's logits equal its teacher's up to rounding."""
  assert_equal_up_to_rounding(logits(config, params), logits(teacher_config, teacher), roundings=ROUNDINGS)
