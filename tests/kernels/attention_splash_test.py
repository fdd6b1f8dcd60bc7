import functools

import jax
import jax.numpy as jnp
import pytest

from distill.kernels import attention_splash as module
from distill.kernels.attention import attention, attention_reference
from distill.kernels.attention_loop import Scoring
from distill.kernels.attention_splash import splash_attention
from tests.kernels.attention_test import operands
from tests.kernels.precision import (
  assert_equal_up_to_rounding,
  in_float64,
  matmul_precisions,
  segment_numbers,
  value_and_gradients,
)
from tests.kernels.tpu import compile_for_tpu, needs_compiler


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Blocks of 128 queries, and as many or twice as many keys."""
  monkeypatch.setattr(module, "_MAX_BLOCK", 128)


def functions(length, options):
  """Returns the kernel, run as XLA operations, and the definition, of q, k, v and, if they are given, sinks."""
  segments = jnp.asarray(segment_numbers((2, length), share=0.02))
  scoring = Scoring(0.4, options.get("softcap"), options.get("window"))
  kernel = functools.partial(splash_attention, interpret=True)
  return (
    lambda q, k, v, sinks=None: kernel(scoring, q, k, v, segments, sinks),
    lambda q, k, v, sinks=None: attention_reference(q, k, v, segments=segments, scale=0.4, sinks=sinks, **options),
  )


@pytest.mark.parametrize(
  ("length", "options"),
  [
    (3, {}),
    (200, {}),
    (300, {"window": 7}),
    (300, {"window": 150, "softcap": 2.0}),
    (500, {"softcap": 2.0}),
  ],
)
@pytest.mark.parametrize("sinks", [False, True])
def test_the_kernel_equals_the_definition_in_value_and_gradient(length, options, sinks):
  given = operands(length, width=16)[: 4 if sinks else 3]
  kernel, definition = functions(length, options)
  got = value_and_gradients(kernel, *map(jnp.asarray, given))
  assert_equal_up_to_rounding(got, in_float64(definition, *given), roundings=2 * (16 + 2 * length) + 20)


@pytest.mark.parametrize("sinks", [False, True])
def test_the_kernel_of_bfloat16_operands_is_exact_up_to_bfloat16_rounding(sinks):
  *given, sink = operands(300, width=16)
  # Sinks are parameters, which stay float32.
  given = [*(jnp.asarray(x, jnp.bfloat16) for x in given), *([jnp.asarray(sink)] if sinks else [])]
  kernel, definition = functions(300, {"window": 150})
  got = value_and_gradients(kernel, *given)
  # Scaled queries, weights, cotangents, their products, the results and the scaled gradient are rounded once each.
  assert_equal_up_to_rounding(got, in_float64(definition, *given), roundings=8, dtype=jnp.bfloat16)


def test_products_of_float32_operands_state_the_highest_precision():
  kernel = functions(300, {})[0]
  highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
  assert matmul_precisions(kernel, *map(jnp.asarray, operands(300)[:3])) == {highest}
  default = (jax.lax.Precision.DEFAULT, jax.lax.Precision.DEFAULT)
  assert matmul_precisions(kernel, *(jnp.asarray(x, jnp.bfloat16) for x in operands(300)[:3])) <= {None, default}


@needs_compiler
@pytest.mark.parametrize(
  ("chip", "width", "dtype", "options"),
  [
    ("v5p", 128, jnp.bfloat16, {}),
    ("v5e", 64, jnp.bfloat16, {"window": 128, "sinks": True}),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in [
        ("v5p", 256, jnp.bfloat16, {"window": 1500, "softcap": 50.0}),
        ("v6e", 80, jnp.bfloat16, {"softcap": 50.0}),
        ("v5p", 256, jnp.float32, {"softcap": 50.0, "sinks": True}),
        ("v5e", 96, jnp.float32, {}),
      ]
    ),
  ],
)
def test_the_kernels_compile_for_every_chip_and_hold_no_scores_in_memory(monkeypatch, chip, width, dtype, options):
  monkeypatch.undo()  # Blocks of the real size.
  length, keys, group = 4000, 2, 4
  scoring = {"scale": 0.1, "window": options.get("window"), "softcap": options.get("softcap")}
  shapes = [(1, keys, group, length, width), (1, keys, length, width), (1, keys, length, width), (keys, group)]
  q, k, v, sinks = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
  segments = jax.ShapeDtypeStruct((1, length), jnp.int32)

  def gradients(segments, *operands):
    def loss(q, k, v, sinks=None):
      return jnp.sum(jnp.square(attention(q, k, v, segments=segments, sinks=sinks, **scoring)))

    return jax.grad(loss, range(len(operands)))(*operands)

  operands = (q, k, v, sinks) if options.get("sinks") else (q, k, v)
  compiled = compile_for_tpu(gradients, segments, *operands, chip=chip)
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
  # The scores would be 512 MB. Heads are stored 128 wide at least.
  queries = keys * group * 4096 * max(width, 128) * 4
  assert compiled.memory_analysis().temp_size_in_bytes < 6 * queries
