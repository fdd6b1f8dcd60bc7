import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.kernels import gated_delta
from distill.kernels.gated_delta import gated_delta_rule, gated_delta_rule_reference, unit_lower_inverse
from tests.kernels.precision import assert_equal_up_to_rounding, in_float64, segment_numbers, value_and_gradients
from tests.kernels.programs import matmul_precisions

NAMES = ("q", "k", "v", "log_decay", "beta")


def operands(length, *, heads=3, key=5, value=7):
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, 2, length, heads, key))
  k /= np.linalg.norm(k, axis=-1, keepdims=True)
  v, log_decay = rng.normal(size=(2, length, heads, value)), -rng.exponential(size=(2, length, heads))
  return [x.astype(np.float32) for x in (q, k, v, log_decay, rng.random((2, length, heads)))]


def rule(function, segments, **options):
  """Binds `segments` and `options`; returns a function of q, k, v, log_decay and beta."""
  return lambda *given: function(*given[:3], log_decay=given[3], beta=given[4], segments=segments, **options)


def use_platform(monkeypatch, name):
  """Makes the kernel choose the form for a platform; it still runs on the CPU."""
  monkeypatch.setattr(gated_delta, "platform", lambda: name)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize(("length", "chunk", "share"), [(1, 64, 0.0), (7, 64, 0.0), (37, 2, 0.1), (64, 64, 0.1)])
def test_gated_delta_rule_equals_its_definition_in_value_and_gradient(monkeypatch, platform, length, chunk, share):
  use_platform(monkeypatch, platform)
  given, segments = operands(length), jnp.asarray(segment_numbers((2, length), share=share))
  got = value_and_gradients(rule(gated_delta_rule, segments, chunk=chunk), *map(jnp.asarray, given))
  expected = in_float64(rule(gated_delta_rule_reference, segments), *given)
  # Each position adds a product over H and one over P to a state that all later positions read.
  assert_equal_up_to_rounding(got, expected, roundings=2 * (5 + 7 + length))


def test_gated_delta_reference_equals_the_recurrence_of_each_document():
  given = operands(3)
  q, k, v, log_decay, beta = (x[0, :, 0].astype(np.float64) for x in given)
  state, expected = np.zeros((5, 7)), []
  for t in range(3):
    state *= np.exp(log_decay[t])
    state += beta[t] * np.outer(k[t], v[t] - state.T @ k[t])
    expected.append(state.T @ q[t])
  out, last = rule(gated_delta_rule_reference, jnp.ones((2, 3), int))(*map(jnp.asarray, given))
  np.testing.assert_allclose(out[0, :, 0], expected, atol=1e-5)
  np.testing.assert_allclose(last[0, 0], state, atol=1e-5)


def test_positions_that_neither_write_nor_decay_do_not_change_the_gated_delta_state():
  q, k, v, log_decay, beta = map(jnp.asarray, operands(90))
  real = (jnp.arange(90) < 50).astype(jnp.float32)[None, :, None]
  _, expected = rule(gated_delta_rule, jnp.ones((2, 50), int))(*(x[:, :50] for x in (q, k, v, log_decay, beta)))
  _, state = rule(gated_delta_rule, jnp.ones((2, 90), int))(q, k, v, log_decay * real, beta * real)
  np.testing.assert_allclose(state, expected, atol=1e-6)


def test_gated_delta_training_needs_memory_linear_in_length_and_no_scan_over_positions():
  def compiled(length):
    given = [jnp.asarray(x[:1]) for x in operands(length, key=16, value=16)]
    run = rule(gated_delta_rule, jnp.ones((1, length), int))
    step = jax.jit(jax.grad(lambda given: jnp.sum(run(*given)[0] ** 2)))
    loops = [int(found) for found in re.findall(r"length=(\d+)", str(step.trace(given).jaxpr))]
    return step.lower(given).compile().memory_analysis().temp_size_in_bytes, max(loops)

  (short, _), (long, loop) = compiled(2048), compiled(8192)
  assert long <= 4.2 * short
  assert loop <= 8192 // 64


def test_gated_delta_values_and_gradients_are_finite_for_strong_decay_and_long_rows():
  q, k, v, log_decay, beta = map(jnp.asarray, operands(512))
  run = rule(gated_delta_rule, jnp.ones((2, 512), int))
  found = value_and_gradients(run, q, k, v, log_decay * 100, beta)
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(found))


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_accelerators_multiply_float32_operands_in_float32(monkeypatch, platform):
  use_platform(monkeypatch, platform)
  run = rule(gated_delta_rule, jnp.ones((2, 300), int))
  assert matmul_precisions(lambda *given: value_and_gradients(run, *given), *operands(300)) == {"HIGHEST"}


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("size", [1, 2, 16])
def test_unit_lower_inverse_is_accurate_where_all_entries_below_the_diagonal_are_one(monkeypatch, platform, size):
  use_platform(monkeypatch, platform)
  # Equal keys make every entry below the diagonal one, where a product of powers overflows its digits.
  a = np.tril(np.ones((3, size, size), np.float32), -1)
  got = value_and_gradients(unit_lower_inverse, jnp.asarray(a))
  expected = in_float64(lambda a: jnp.linalg.inv(jnp.broadcast_to(jnp.eye(size, dtype=a.dtype), a.shape) + a), a)
  assert_equal_up_to_rounding(got, expected, roundings=2 * size)
