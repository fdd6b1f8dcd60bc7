import jax
import jax.numpy as jnp
import pytest

from distill.kernels import attention_loop as module
from distill.kernels.attention import attention_reference
from distill.kernels.attention_loop import Scoring, looped_attention
from tests.kernels.attention_test import operands
from tests.kernels.precision import (
  assert_equal_up_to_rounding,
  in_float64,
  matmul_precisions,
  segment_numbers,
  value_and_gradients,
)


def functions(length, options):
  """Returns the loop and the definition, of q, k, v and, if they are given, sinks."""
  segments = jnp.asarray(segment_numbers((2, length)))
  scoring = Scoring(0.4, options.get("softcap"), options.get("window"))
  return (
    lambda q, k, v, sinks=None: looped_attention(scoring, q, k, v, segments, sinks),
    lambda q, k, v, sinks=None: attention_reference(q, k, v, segments=segments, scale=0.4, sinks=sinks, **options),
  )


@pytest.mark.parametrize(
  ("length", "options"),
  # The gradient of a single key is zero, but only up to the rounding of the two numbers that cancel: there are more.
  [
    (4, {"window": 9}),
    (17, {}),
    (17, {"window": 5}),
    (17, {"window": 2, "softcap": 2.0}),
    (13, {"softcap": 2.0}),
  ],
)
@pytest.mark.parametrize("sinks", [False, True])
def test_the_loop_equals_the_definition_in_value_and_gradient(monkeypatch, length, options, sinks):
  monkeypatch.setattr(module, "_BLOCK", 4)
  given = operands(length)[: 4 if sinks else 3]
  loop, definition = functions(length, options)
  got = value_and_gradients(loop, *map(jnp.asarray, given))
  assert_equal_up_to_rounding(got, in_float64(definition, *given), roundings=2 * (5 + 2 * length) + 20)


def test_the_loop_over_bfloat16_operands_is_exact_up_to_bfloat16_rounding(monkeypatch):
  monkeypatch.setattr(module, "_BLOCK", 4)
  given = [jnp.asarray(x, jnp.bfloat16) for x in operands(11)[:3]]
  loop, definition = functions(11, {})
  got = value_and_gradients(loop, *given)
  # Weights, cotangents, their products and the results are rounded once each.
  assert_equal_up_to_rounding(got, in_float64(definition, *given), roundings=6, dtype=jnp.bfloat16)


@pytest.mark.parametrize(("length", "window"), [(4, None), (20, None), (20, 1), (20, 5), (20, 6), (20, 99)])
def test_the_pairs_of_blocks_hold_every_score_that_is_not_masked_and_no_block_without_one(monkeypatch, length, window):
  monkeypatch.setattr(module, "_BLOCK", 4)
  pairs = [tuple(pair) for pair in module._pairs(length, window)]
  near = range(length if window is None else window)
  assert set(pairs) == {(i // 4 * 4, j // 4 * 4) for i in range(length) for j in range(length) if i - j in near}
  assert pairs == sorted(pairs)


def test_memory_of_value_and_gradients_grows_linearly_and_the_program_does_not_grow():
  def program(length):
    q, k, segments = (
      jax.ShapeDtypeStruct(shape, dtype)
      for shape, dtype in [((1, 1, 2, length, 8), jnp.float32), ((1, 1, length, 8), jnp.float32), ((1, length), int)]
    )
    scoring = Scoring(0.4, None, None)
    loss = lambda q, k, v, segments: jnp.sum(looped_attention(scoring, q, k, v, segments))  # noqa: E731
    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, segments)

  short, long = program(4096), program(16384)
  memory = [lowered.compile().memory_analysis().temp_size_in_bytes for lowered in (short, long)]
  assert memory[1] < 4.2 * memory[0]
  assert len(long.as_text().splitlines()) == len(short.as_text().splitlines())


def test_products_of_float32_operands_state_the_highest_precision():
  loop = functions(11, {})[0]
  highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
  assert matmul_precisions(loop, *map(jnp.asarray, operands(11)[:3])) == {highest}
  assert matmul_precisions(loop, *(jnp.asarray(x, jnp.bfloat16) for x in operands(11)[:3])) == {None}
