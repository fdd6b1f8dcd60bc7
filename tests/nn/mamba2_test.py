import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distill.nn.mamba2 import Mamba2, Mamba2Config
from distill.nn.param import Init

CONFIG = Mamba2Config(num_heads=6, head_dim=8, state_size=5, num_groups=3, use_bias=True, min_step=0.01, max_step=0.9)


@pytest.fixture(scope="module")
def mixer():
  """(graph, parameters) of a mixer whose every parameter is perturbed."""
  graph, state = nnx.split(Mamba2(Init(jax.random.key(0)), config=CONFIG, width=16, norm_eps=1e-5))
  leaves, tree = jax.tree.flatten(state)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  moved = [x + 0.3 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
  return graph, jax.tree.unflatten(tree, moved)


def mixed(mixer, state, x, segments):
  segments = jnp.asarray(segments)
  return nnx.merge(mixer[0], state)(x, segments=segments, positions=segments, dtype=jnp.float32)


def stepper(mixer):
  """A compiled step(x, state) -> (output, state)."""
  module = nnx.merge(*mixer)
  return jax.jit(lambda x, state: module.step(x, state=state, positions=jnp.zeros(len(x), int), dtype=jnp.float32))


def test_documents_in_one_row_are_as_in_rows_of_their_own_with_their_gradients(mixer):
  x = jax.random.normal(jax.random.key(2), (1, 150, 16))
  borders = (0, 3, 70, 128, 150)

  def packed(state):
    y = mixed(mixer, state, x, np.repeat([[1, 2, 3, 4]], np.diff(borders), axis=1))
    return jnp.sum(jnp.sin(y)), y

  def apart(state):
    spans = [slice(*pair) for pair in zip(borders, borders[1:], strict=False)]
    y = [mixed(mixer, state, x[:, one], np.ones((1, one.stop - one.start), int)) for one in spans]
    return jnp.sum(jnp.sin(jnp.concatenate(y, axis=1))), jnp.concatenate(y, axis=1)

  (_, together), grads = jax.jit(jax.value_and_grad(packed, has_aux=True))(mixer[1])
  (_, alone), expected = jax.jit(jax.value_and_grad(apart, has_aux=True))(mixer[1])
  np.testing.assert_allclose(together, alone, atol=2e-6 * float(jnp.abs(alone).max()))
  for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
    assert jnp.linalg.norm(one - other) <= 1e-5 * jnp.linalg.norm(other)


def test_padded_prompts_at_once_and_steps_after_them_equal_whole_rows(mixer):
  module, step = nnx.merge(*mixer), stepper(mixer)
  lengths, length = jnp.asarray([70, 2, 1, 0, 33]), 76
  x = jax.random.normal(jax.random.key(3), (5, length, 16))
  whole = jax.jit(lambda x: mixed(mixer, mixer[1], x, np.ones((5, length), int)))(x)
  scale = float(jnp.abs(whole).max())
  prefill = jax.jit(lambda x: module.prefill(x, lengths=lengths, length=length, dtype=jnp.float32))
  y, state = prefill(x[:, :70])
  for row, count in enumerate(lengths):
    np.testing.assert_allclose(y[row, :count], whole[row, :count], atol=2e-6 * scale)
  nothing = module.init_state(1, length=length, dtype=jnp.float32)
  jax.tree.map(lambda one, none: np.testing.assert_array_equal(one[3:4], none), state, nothing)
  for ahead in range(6):
    y, state = step(x[jnp.arange(5), lengths + ahead], state)
    np.testing.assert_allclose(y, whole[jnp.arange(5), lengths + ahead], atol=2e-6 * scale)


def test_steps_from_an_empty_state_equal_the_whole_row(mixer):
  step, state = stepper(mixer), nnx.merge(*mixer).init_state(2, length=9, dtype=jnp.float32)
  x = jax.random.normal(jax.random.key(4), (2, 9, 16))
  whole = mixed(mixer, mixer[1], x, np.ones((2, 9), int))
  for t in range(9):
    y, state = step(x[:, t], state)
    np.testing.assert_allclose(y, whole[:, t], atol=2e-6 * float(jnp.abs(whole).max()))


def test_fresh_parameters_are_drawn_as_in_the_paper():
  config = Mamba2Config(num_heads=500, head_dim=1, state_size=1)
  module = Mamba2(Init(jax.random.key(0)), config=config, width=4, norm_eps=1e-5)
  rates, steps = jnp.exp(module.a_log[...]), jax.nn.softplus(module.dt_bias[...])
  assert 1.0 <= rates.min() < 1.2 and 15.8 < rates.max() <= 16.0
  assert 0.00099 <= steps.min() < 0.0011 and 0.09 < steps.max() <= 0.1001
  assert abs(float(jnp.log(steps).mean()) - np.log(0.01)) < 0.2
  assert (module.skip[...] == 1).all()
