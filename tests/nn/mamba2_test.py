import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distill.nn.mamba2 import Mamba2, Mamba2Config, ssd
from distill.nn.param import Init


def inputs(length, seed=0, heads=6, groups=2, state=5, width=7):
  rng = np.random.default_rng(seed)
  return dict(
    x=rng.normal(size=(2, length, heads, width)),
    log_decay=-rng.exponential(size=(2, length, heads)),
    b=rng.normal(size=(2, length, groups, state)),
    c=rng.normal(size=(2, length, groups, state)),
  )


def documents(length, seed=1):
  return 1 + np.cumsum(np.random.default_rng(seed).random((2, length)) < 0.1, axis=1)


def float32(given):
  return {name: jnp.asarray(x, jnp.float32) for name, x in given.items()}


def recurrence(x, log_decay, b, c, segments):
  """(out, last state), step by step, in the dtype of the inputs."""
  heads = x.shape[2] // b.shape[2]
  out, state = np.zeros(x.shape), np.zeros((x.shape[0], x.shape[2], b.shape[-1], x.shape[-1]))
  for row in range(x.shape[0]):
    for t in range(x.shape[1]):
      same = t > 0 and segments[row, t] == segments[row, t - 1]
      for n in range(x.shape[2]):
        decayed = state[row, n] * np.exp(log_decay[row, t, n]) if same else 0.0
        state[row, n] = decayed + np.outer(b[row, t, n // heads], x[row, t, n])
        out[row, t, n] = state[row, n].T @ c[row, t, n // heads]
  return out, state


@pytest.mark.parametrize(("length", "chunk"), [(1, 64), (37, 8), (64, 64), (130, 32)])
def test_the_chunked_form_equals_the_recurrence_with_documents(length, chunk):
  given, segments = inputs(length), documents(length)
  expected = recurrence(**given, segments=segments)
  got = ssd(**float32(given), segments=jnp.asarray(segments), chunk=chunk)
  for one, other in zip(got, expected, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


def test_weak_decays_beside_strong_ones_keep_their_digits():
  given = inputs(64)
  strong = np.random.default_rng(2).random((2, 64, 6)) < 0.5
  given["log_decay"] = np.where(strong, -90.0, 1e-3 * given["log_decay"])
  segments = np.ones((2, 64), int)
  expected, _ = recurrence(**float32(given), segments=segments)
  got, _ = ssd(**float32(given), segments=jnp.asarray(segments))
  assert np.linalg.norm(got - expected) <= 1e-6 * np.linalg.norm(expected)


def scanned(x, log_decay, b, c, segments):
  """The recurrence as a scan over positions that autodiff can follow."""
  b, c = (jnp.repeat(y, x.shape[2] // b.shape[2], axis=2) for y in (b, c))
  same = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (1, 0)))
  decay = jnp.exp(log_decay) * same[..., None]

  def body(state, xs):
    x, decay, b, c = xs
    state = state * decay[..., None, None] + jnp.einsum("bnh,bnp->bnhp", b, x)
    return state, jnp.einsum("bnhp,bnh->bnp", state, c)

  state = jnp.zeros((x.shape[0], x.shape[2], b.shape[-1], x.shape[-1]))
  state, out = jax.lax.scan(body, state, tuple(y.swapaxes(0, 1) for y in (x, decay, b, c)))
  return out.swapaxes(0, 1), state


def test_gradients_equal_those_of_the_recurrence():
  given, segments = float32(inputs(100)), jnp.asarray(documents(100))
  given["log_decay"] = 0.3 * given["log_decay"]

  def gradients(rule):
    def loss(given):
      out, state = rule(**given, segments=segments)
      return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(state))

    return jax.jit(jax.grad(loss))(given)

  expected = gradients(scanned)
  for name, got in gradients(lambda **given: ssd(**given, chunk=32)).items():
    assert jnp.linalg.norm(got - expected[name]) <= 1e-5 * jnp.linalg.norm(expected[name]), name


def test_strong_decay_and_long_rows_stay_finite_with_finite_gradients():
  given = float32(inputs(1024))
  given["log_decay"] = given["log_decay"] * 1e4

  def loss(given):
    out, state = ssd(**given, segments=jnp.ones((2, 1024), int))
    return jnp.sum(out**2) + jnp.sum(state**2)

  value, grads = jax.value_and_grad(loss)(given)
  assert jnp.isfinite(value) and all(jnp.isfinite(x).all() for x in jax.tree.leaves(grads))


SPEC = Mamba2Config(num_heads=6, head_dim=8, state_size=5, num_groups=3, use_bias=True, min_step=0.01, max_step=0.9)


@pytest.fixture(scope="module")
def mixer():
  """(graph, parameters) of a mixer whose every parameter is perturbed."""
  graph, state = nnx.split(Mamba2(Init(jax.random.key(0)), spec=SPEC, width=16, norm_eps=1e-5))
  leaves, tree = jax.tree.flatten(state)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  moved = [x + 0.3 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
  return graph, jax.tree.unflatten(tree, moved)


def mixed(mixer, state, x, segments):
  segments = jnp.asarray(segments)
  return nnx.merge(mixer[0], state)(x, segments=segments, positions=segments, dtype=jnp.float32)


def stepper(mixer):
  """step(x, cache) -> (output, cache), compiled."""
  module = nnx.merge(*mixer)
  return jax.jit(lambda x, cache: module.step(x, cache=cache, positions=jnp.zeros(len(x), int), dtype=jnp.float32))


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
  y, cache = prefill(x[:, :70])
  for row, count in enumerate(lengths):
    np.testing.assert_allclose(y[row, :count], whole[row, :count], atol=2e-6 * scale)
  nothing = module.init_cache(1, length=length, dtype=jnp.float32)
  jax.tree.map(lambda one, none: np.testing.assert_array_equal(one[3:4], none), cache, nothing)
  for ahead in range(6):
    y, cache = step(x[jnp.arange(5), lengths + ahead], cache)
    np.testing.assert_allclose(y, whole[jnp.arange(5), lengths + ahead], atol=2e-6 * scale)


def test_an_empty_cache_and_steps_equal_the_whole_row(mixer):
  step, cache = stepper(mixer), nnx.merge(*mixer).init_cache(2, length=9, dtype=jnp.float32)
  x = jax.random.normal(jax.random.key(4), (2, 9, 16))
  whole = mixed(mixer, mixer[1], x, np.ones((2, 9), int))
  for t in range(9):
    y, cache = step(x[:, t], cache)
    np.testing.assert_allclose(y, whole[:, t], atol=2e-6 * float(jnp.abs(whole).max()))


def test_fresh_parameters_are_drawn_as_in_the_paper():
  spec = Mamba2Config(num_heads=500, head_dim=1, state_size=1)
  module = Mamba2(Init(jax.random.key(0)), spec=spec, width=4, norm_eps=1e-5)
  rates, steps = jnp.exp(module.a_log[...]), jax.nn.softplus(module.dt_bias[...])
  assert 1.0 <= rates.min() < 1.2 and 15.8 < rates.max() <= 16.0
  assert 0.00099 <= steps.min() < 0.0011 and 0.09 < steps.max() <= 0.1001
  assert abs(float(jnp.log(steps).mean()) - np.log(0.01)) < 0.2
  assert (module.skip[...] == 1).all()
