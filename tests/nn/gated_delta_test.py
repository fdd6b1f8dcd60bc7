import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.nn.conv import causal_conv
from distill.nn.gated_delta import gated_delta_rule


def inputs(length, seed=0, heads=3, key=5, value=7):
  rng = np.random.default_rng(seed)
  q, k = rng.normal(size=(2, 2, length, heads, key))
  k /= np.linalg.norm(k, axis=-1, keepdims=True)
  return dict(
    q=q,
    k=k,
    v=rng.normal(size=(2, length, heads, value)),
    log_decay=-rng.exponential(size=(2, length, heads)),
    beta=rng.random((2, length, heads)),
  )


def recurrence(q, k, v, log_decay, beta, segments):
  """Step by step in float64: outputs, and states after the last position."""
  out, last = np.zeros(v.shape), np.zeros((*q.shape[:1], *q.shape[2:], v.shape[-1]))
  for b in range(q.shape[0]):
    for n in range(q.shape[2]):
      state, before = np.zeros((q.shape[-1], v.shape[-1])), None
      for t in range(q.shape[1]):
        state = state * (np.exp(log_decay[b, t, n]) if segments[b, t] == before else 0.0)
        before = segments[b, t]
        error = v[b, t, n] - state.T @ k[b, t, n]
        state = state + beta[b, t, n] * np.outer(k[b, t, n], error)
        out[b, t, n] = state.T @ q[b, t, n]
      last[b, n] = state
  return out, last


@pytest.mark.parametrize(("length", "chunk"), [(1, 64), (37, 8), (64, 64), (130, 32)])
def test_the_chunked_form_equals_the_recurrence_with_documents(length, chunk):
  given = inputs(length)
  rng = np.random.default_rng(1)
  segments = 1 + np.cumsum(rng.random((2, length)) < 0.1, axis=1)
  found = gated_delta_rule(
    **{name: jnp.asarray(x, jnp.float32) for name, x in given.items()}, segments=jnp.asarray(segments), chunk=chunk
  )
  for got, expected in zip(found, recurrence(**given, segments=segments), strict=True):
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


def test_positions_that_neither_write_nor_decay_leave_the_state_as_it_was():
  given = {name: jnp.asarray(x, jnp.float32) for name, x in inputs(90).items()}
  short = {name: x[:, :50] for name, x in given.items()}
  kept = (jnp.arange(90) < 50).astype(jnp.float32)[None, :, None]
  padded = {**given, "log_decay": given["log_decay"] * kept, "beta": given["beta"] * kept}
  _, expected = gated_delta_rule(**short, segments=jnp.ones((2, 50), int))
  _, state = gated_delta_rule(**padded, segments=jnp.ones((2, 90), int))
  np.testing.assert_allclose(state, expected, atol=1e-6)


def test_strong_decay_and_long_rows_stay_finite_with_finite_gradients():
  given = {name: jnp.asarray(x, jnp.float32) for name, x in inputs(512).items()}
  given["log_decay"] = given["log_decay"] * 100

  def loss(given):
    return jnp.sum(gated_delta_rule(**given, segments=jnp.ones((2, 512), int))[0] ** 2)

  value, grads = jax.value_and_grad(loss)(given)
  assert jnp.isfinite(value) and all(jnp.isfinite(x).all() for x in jax.tree.leaves(grads))


def test_the_convolution_stays_within_documents():
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(1, 9, 2)), rng.normal(size=(4, 2))
  segments = np.asarray([[1, 1, 1, 2, 2, 2, 2, 2, 0]])
  got = causal_conv(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32), segments=jnp.asarray(segments))
  for part in (slice(0, 3), slice(3, 8)):
    padded = np.concatenate([np.zeros((3, 2)), x[0, part]])
    expected = [(padded[t : t + 4] * kernel).sum(0) for t in range(part.stop - part.start)]
    np.testing.assert_allclose(got[0, part], expected, atol=1e-5)
