"""Tests every mixer of the package through the interfaces `Mixer` and `MixerConfig` alone."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from distill.nn.attention import AttentionConfig
from distill.nn.gated_delta import GatedDeltaConfig
from distill.nn.mamba2 import Mamba2Config
from distill.nn.mixer import Mixer, MixerConfig
from distill.nn.param import Init
from distill.nn.rope import DynamicNtk, RopeConfig
from tests.kernels.precision import assert_equal_up_to_rounding

WIDTH, LENGTH = 16, 12
MIXERS = {
  "plain attention": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, rope=RopeConfig()),
  "attention with everything": AttentionConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope=RopeConfig(fraction=0.5, scaling=DynamicNtk(factor=2.0, max_positions=4)),
    window=4,
    softcap=3.0,
    sinks=True,
    gated=True,
    qk_norm="head",
    use_bias=True,
    use_out_bias=True,
  ),
  "gated delta": GatedDeltaConfig(num_key_heads=2, num_value_heads=4, key_head_dim=6, value_head_dim=8),
  "Mamba-2": Mamba2Config(num_heads=4, head_dim=8, state_size=6, num_groups=2),
}
# Roundings behind one number: sums over the width, the heads and the positions, and normalisations.
ROUNDINGS = 8 * (WIDTH + 32 + LENGTH)


@pytest.fixture(scope="module", params=MIXERS.values(), ids=MIXERS)
def built(request):
  """Returns (configuration, module) of a mixer whose parameters all differ from their initial values."""
  module = request.param.build(Init(jax.random.key(0)), width=WIDTH, norm_eps=1e-5, norm_offset=0.0)
  graph, state = nnx.split(module)
  leaves, tree = jax.tree.flatten(state)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  moved = [x + 0.2 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
  return request.param, nnx.merge(graph, jax.tree.unflatten(tree, moved))


def whole_rows(module, x):
  ones, positions = jnp.ones(x.shape[:2], int), jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
  return jax.jit(lambda x: module(x, segments=ones, positions=positions, dtype=jnp.float32))(x)


def test_a_mixer_configuration_states_the_widths_that_its_module_has(built):
  config, module = built
  assert isinstance(config, MixerConfig) and isinstance(module, Mixer)
  q, k, v = module.qkv(jnp.ones((1, 3, WIDTH)), dtype=jnp.float32)
  assert tuple(x.shape[-1] for x in (q, k, v)) == config.qkv_widths
  if shape := config.head_shape:  # None is legal: a mixer may have no heads.
    assert (shape.key_heads * shape.key_width, shape.heads * shape.value_width) == (
      k.shape[-1],
      module.o.kernel.shape[0],
    )


def test_mixer_prefill_and_decoding_steps_equal_a_call_on_whole_rows(built):
  _, module = built
  x = jax.random.normal(jax.random.key(2), (3, LENGTH, WIDTH))
  lengths, ahead = jnp.asarray([6, 2, 1]), LENGTH - 6
  expected = whole_rows(module, x)
  y, state = jax.jit(lambda x: module.prefill(x, lengths=lengths, length=LENGTH, dtype=jnp.float32))(x[:, :6])
  step = jax.jit(lambda x, state, at: module.step(x, state=state, positions=at, dtype=jnp.float32))
  for row, length in enumerate(lengths):
    assert_equal_up_to_rounding(y[row, :length], expected[row, :length], roundings=ROUNDINGS)
  for i in range(ahead):
    y, state = step(x[jnp.arange(3), lengths + i], state, lengths + i)
    assert_equal_up_to_rounding(y, expected[jnp.arange(3), lengths + i], roundings=ROUNDINGS)


def test_mixer_decoding_steps_from_an_empty_state_equal_a_call_on_whole_rows(built):
  _, module = built
  x = jax.random.normal(jax.random.key(3), (2, LENGTH, WIDTH))
  expected, state = whole_rows(module, x), module.init_state(2, length=LENGTH, dtype=jnp.float32)
  step = jax.jit(lambda x, state, at: module.step(x, state=state, positions=at, dtype=jnp.float32))
  for t in range(LENGTH):
    y, state = step(x[:, t], state, jnp.full(2, t))
    assert_equal_up_to_rounding(y, expected[:, t], roundings=ROUNDINGS)
