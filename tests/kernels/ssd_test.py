import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distill.kernels.ssd as ssd_module
from distill.kernels.ssd import ssd, ssd_reference
from tests.kernels.precision import assert_equal_up_to_rounding, in_float64, segment_numbers, value_and_gradients
from tests.kernels.programs import matmul_precisions


def operands(length, *, heads=6, groups=2, state=5, width=7):
  rng = np.random.default_rng(0)
  x, log_decay = rng.normal(size=(2, length, heads, width)), -rng.exponential(size=(2, length, heads))
  b, c = rng.normal(size=(2, 2, length, groups, state))
  return [y.astype(np.float32) for y in (x, log_decay, b, c)]


def rule(function, segments, **options):
  """Binds `segments` and `options`; returns a function of x, log_decay, b and c."""
  return lambda x, log_decay, b, c: function(x, log_decay=log_decay, b=b, c=c, segments=segments, **options)


def use_platform(monkeypatch, name):
  """Makes the kernel choose the form for a platform; it still runs on the CPU."""
  monkeypatch.setattr(ssd_module, "platform", lambda: name)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize(("length", "chunk"), [(1, 64), (37, 8), (64, 64), (90, 32), (300, 8)])
def test_ssd_equals_its_definition_in_value_and_gradient(monkeypatch, platform, length, chunk):
  use_platform(monkeypatch, platform)
  given, segments = operands(length), jnp.asarray(segment_numbers((2, length)))
  got = value_and_gradients(rule(ssd, segments, chunk=chunk), *map(jnp.asarray, given))
  # Each position adds to a state that all later positions read by a sum over H.
  assert_equal_up_to_rounding(got, in_float64(rule(ssd_reference, segments), *given), roundings=2 * (5 + length))


def test_ssd_reference_equals_the_recurrence_of_each_document():
  given = operands(3)
  x, log_decay, b, c = (y[0].astype(np.float64) for y in given)
  out, last = rule(ssd_reference, jnp.ones((2, 3), int))(*map(jnp.asarray, given))
  # Head 4 is in the second of two groups of three heads.
  state = np.zeros((5, 7))
  for t in range(3):
    state = np.exp(log_decay[t, 4]) * state + np.outer(b[t, 1], x[t, 4])
    np.testing.assert_allclose(out[0, t, 4], state.T @ c[t, 1], atol=1e-5)
  np.testing.assert_allclose(last[0, 4], state, atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_ssd_keeps_weak_decays_precise_next_to_strong_ones(monkeypatch, platform):
  use_platform(monkeypatch, platform)
  x, log_decay, b, c = operands(64)
  strong = np.random.default_rng(2).random((2, 64, 6)) < 0.5
  given = [x, np.where(strong, -90.0, 1e-3 * log_decay).astype(np.float32), b, c]
  segments = jnp.ones((2, 64), int)
  got, _ = rule(ssd, segments)(*map(jnp.asarray, given))
  (expected, _), _ = in_float64(rule(ssd_reference, segments), *given)
  assert np.linalg.norm(got - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_accelerators_multiply_float32_operands_in_float32(monkeypatch, platform):
  use_platform(monkeypatch, platform)
  run = rule(ssd, jnp.ones((2, 300), int))
  assert matmul_precisions(lambda *given: value_and_gradients(run, *given), *operands(300)) == {"HIGHEST"}


def test_ssd_values_and_gradients_are_finite_for_strong_decay_and_long_rows():
  x, log_decay, b, c = map(jnp.asarray, operands(1024))
  found = value_and_gradients(rule(ssd, jnp.ones((2, 1024), int)), x, log_decay * 1e4, b, c)
  assert all(jnp.isfinite(y).all() for y in jax.tree.leaves(found))
