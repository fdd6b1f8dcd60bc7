import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.kernels.ssd import ssd


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
