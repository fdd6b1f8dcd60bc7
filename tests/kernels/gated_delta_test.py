import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.kernels.conv import causal_conv
from distill.kernels.gated_delta import gated_delta_rule


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


def by_scan(q, k, v, *, log_decay, beta, segments):
  """The recurrence as it is written down, a position at a time, to be differentiated."""

  def step(carry, xs):
    state, before = carry
    q, k, v, decay, beta, segment = xs
    kept = jnp.where(segment == before, 1.0, 0.0)[:, None] * jnp.exp(decay)
    state = state * kept[..., None, None]
    error = (v - jnp.einsum("bnhp,bnh->bnp", state, k)) * beta[..., None]
    state = state + jnp.einsum("bnh,bnp->bnhp", k, error)
    return (state, segment), jnp.einsum("bnhp,bnh->bnp", state, q)

  carry = jnp.zeros((*q.shape[:1], *q.shape[2:], v.shape[-1])), jnp.full(q.shape[:1], -1)
  xs = tuple(x.swapaxes(0, 1) for x in (q, k, v, log_decay, beta, segments))
  (state, _), out = jax.lax.scan(step, carry, xs)
  return out.swapaxes(0, 1), state


def pulled(rule, given, segments):
  """Gradients of a sum over outputs and state that weighs each differently."""

  def loss(given):
    out, state = rule(**given, segments=segments)
    return jnp.sum(jnp.sin(out + jnp.arange(out.shape[1])[:, None, None])) + jnp.sum(jnp.cos(state))

  return jax.jit(jax.grad(loss))(given)


@pytest.mark.parametrize(("length", "documents"), [(7, 0.0), (64, 0.1), (700, 0.02)])
def test_gradients_equal_those_of_the_recurrence_with_documents(length, documents):
  given = {name: jnp.asarray(x, jnp.float32) for name, x in inputs(length).items()}
  segments = jnp.asarray(1 + np.cumsum(np.random.default_rng(1).random((2, length)) < documents, axis=1))
  expected = pulled(by_scan, given, segments)
  for name, got in pulled(gated_delta_rule, given, segments).items():
    assert jnp.linalg.norm(got - expected[name]) <= 1e-4 * jnp.linalg.norm(expected[name]), name


def test_gradients_of_packed_documents_equal_those_of_separate_rows():
  lengths = (90, 64, 33)
  given = {name: jnp.asarray(x, jnp.float32) for name, x in inputs(sum(lengths)).items()}
  segments = jnp.asarray(np.repeat([[1, 2, 3]], lengths, axis=1)).repeat(2, axis=0)

  def gradient(given, segments):
    return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(gated_delta_rule(**x, segments=segments)[0]))))(given)

  packed, start = gradient(given, segments), 0
  for length in lengths:
    cut = slice(start, start + length)
    alone = gradient({name: x[:, cut] for name, x in given.items()}, segments[:, cut])
    for name, expected in alone.items():
      scale = jnp.linalg.norm(expected)
      assert jnp.linalg.norm(packed[name][:, cut] - expected) <= 1e-4 * scale, name
    start += length


def test_training_takes_memory_linear_in_length_and_no_scan_over_positions():
  def compiled(length):
    given = {name: jnp.asarray(x[:1], jnp.float32) for name, x in inputs(length, key=16, value=16).items()}
    step = jax.jit(jax.grad(lambda x: jnp.sum(gated_delta_rule(**x, segments=jnp.ones((1, length), int))[0] ** 2)))
    loops = [int(found) for found in re.findall(r"length=(\d+)", str(step.trace(given).jaxpr))]
    return step.lower(given).compile().memory_analysis().temp_size_in_bytes, max(loops)

  (short, _), (long, loop) = compiled(2048), compiled(8192)
  assert long <= 4.2 * short
  assert loop <= 8192 // 64


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


@pytest.mark.parametrize("length", [2, 9])
def test_gradients_of_the_convolution_are_those_of_its_sum(length):
  rng = np.random.default_rng(0)
  x, kernel, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, length, 3), (4, 3), (3,)))
  segments = jnp.asarray(1 + np.cumsum(rng.random((2, length)) < 0.3, axis=1))

  def plain(x, kernel, *, segments):
    rows = jnp.arange(length)
    same = (segments[:, :, None] == segments[:, None, :]) & (rows[:, None] - rows >= 0) & (rows[:, None] - rows < 4)
    taps = jnp.where(same[..., None], kernel[::-1][jnp.clip(rows[:, None] - rows, 0, 3)], 0.0)
    return jnp.einsum("btsi,bsi->bti", taps, x)

  expected, got = (
    jax.grad(lambda x, kernel, f=f: jnp.sum(jnp.sin(f(x, kernel, segments=segments)) @ weight), argnums=(0, 1))(
      x, kernel
    )
    for f in (plain, causal_conv)
  )
  for a, b in zip(expected, got, strict=True):
    np.testing.assert_allclose(b, a, atol=1e-5)
