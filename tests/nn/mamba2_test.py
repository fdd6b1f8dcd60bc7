import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distill.nn.mamba2 import Mamba2, Mamba2Config
from distill.nn.param import Init
from tests.kernels.precision import assert_equal_up_to_rounding

CONFIG = Mamba2Config(num_heads=6, head_dim=8, state_size=5, num_groups=3, use_bias=True, min_step=0.01, max_step=0.9)
EPS = float(jnp.finfo(jnp.float32).eps)
# Behind each number are sums over the width, the heads and up to 150 positions; four times that as headroom.
ROUNDINGS = 4 * (16 + 6 * 8 + 150)


@pytest.fixture(scope="module")
def mixer():
  """Returns (graph, parameters) of a Mamba-2 mixer, with noise added to every parameter."""
  graph, state = nnx.split(Mamba2(Init(jax.random.key(0)), config=CONFIG, width=16, norm_eps=1e-5))
  leaves, tree = jax.tree.flatten(state)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  moved = [x + 0.3 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
  return graph, jax.tree.unflatten(tree, moved)


def mixed(mixer, state, x, segments):
  segments = jnp.asarray(segments)
  return nnx.merge(mixer[0], state)(x, segments=segments, positions=segments, dtype=jnp.float32)


def test_packed_documents_have_the_mamba_2_outputs_and_gradients_of_separate_rows(mixer):
  x = jax.random.normal(jax.random.key(2), (1, 150, 16))
  borders = (0, 3, 70, 128, 150)

  def packed(state):
    y = mixed(mixer, state, x, np.repeat([[1, 2, 3, 4]], np.diff(borders), axis=1))
    return jnp.sum(jnp.sin(y)), y

  def separate(state):
    sizes = np.diff(borders)
    real = np.arange(sizes.max()) < sizes[:, None]
    rows = jnp.zeros((*real.shape, 16)).at[real].set(x[0])
    y = mixed(mixer, state, rows, real.astype(int))[real][None]
    return jnp.sum(jnp.sin(y)), y

  (_, together), grads = jax.jit(jax.value_and_grad(packed, has_aux=True))(mixer[1])
  (_, alone), expected = jax.jit(jax.value_and_grad(separate, has_aux=True))(mixer[1])
  assert_equal_up_to_rounding(together, alone, roundings=ROUNDINGS)
  # A parameter's gradient is one more sum over all positions.
  limit = (ROUNDINGS + 4 * 150) * EPS / 2
  for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
    assert jnp.linalg.norm(one - other) <= limit * jnp.linalg.norm(other)


def test_mamba_2_prefill_over_several_chunks_and_decoding_steps_equal_a_call_on_whole_rows(mixer):
  module = nnx.merge(*mixer)
  step = jax.jit(lambda x, state: module.step(x, state=state, positions=jnp.zeros(len(x), int), dtype=jnp.float32))
  lengths, length = jnp.asarray([70, 2, 1, 0, 33]), 76
  x = jax.random.normal(jax.random.key(3), (5, length, 16))
  whole = jax.jit(lambda x: mixed(mixer, mixer[1], x, np.ones((5, length), int)))(x)
  prefill = jax.jit(lambda x: module.prefill(x, lengths=lengths, length=length, dtype=jnp.float32))
  y, state = prefill(x[:, :70])
  for row, count in ((row, count) for row, count in enumerate(lengths) if count):
    assert_equal_up_to_rounding(y[row, :count], whole[row, :count], roundings=ROUNDINGS)
  empty = module.init_state(1, length=length, dtype=jnp.float32)
  jax.tree.map(lambda one, none: np.testing.assert_array_equal(one[3:4], none), state, empty)
  for ahead in range(6):
    y, state = step(x[jnp.arange(5), lengths + ahead], state)
    assert_equal_up_to_rounding(y, whole[jnp.arange(5), lengths + ahead], roundings=ROUNDINGS)
