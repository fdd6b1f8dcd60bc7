import functools

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from distill.kernels import attention_cudnn as module
from distill.kernels.attention import attention_reference
from distill.kernels.attention_cudnn import cudnn_attention, cudnn_takes
from distill.kernels.attention_loop import Scoring
from tests.kernels.attention_test import operands
from tests.kernels.precision import assert_equal_up_to_rounding, in_float64, segment_numbers, value_and_gradients


@pytest.mark.parametrize("window", [None, 5])
def test_what_is_asked_of_cudnn_is_the_definition(monkeypatch, window):
  # There is no cuDNN without a GPU. XLA computes the same function of the same arguments.
  xla = functools.partial(jax.nn.dot_product_attention, implementation="xla")

  def replaced(*arguments, implementation, **options):
    assert implementation == "cudnn"
    return xla(*arguments, **options)

  monkeypatch.setattr(module.jax.nn, "dot_product_attention", replaced)
  segments = jnp.asarray(segment_numbers((2, 17)))
  given = operands(17)[:3]
  got = value_and_gradients(
    lambda q, k, v: cudnn_attention(Scoring(0.4, None, window), q, k, v, segments), *map(jnp.asarray, given)
  )
  expected = in_float64(
    lambda q, k, v: attention_reference(q, k, v, segments=segments, scale=0.4, window=window), *given
  )
  assert_equal_up_to_rounding(got, expected, roundings=100)


def test_value_and_gradients_lower_to_cudnn_calls(monkeypatch):
  # The version that jax 0.10 asks of CUDA's plugin, which only machines with a GPU have.
  monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
  q, k, segments = (
    jax.ShapeDtypeStruct(shape, dtype)
    for shape, dtype in [
      ((2, 2, 4, 128, 64), jnp.bfloat16),
      ((2, 2, 128, 64), jnp.bfloat16),
      ((2, 128), jnp.int32),
    ]
  )

  def gradients(q, k, v, segments):
    scoring = Scoring(0.4, None, 50)
    return value_and_gradients(lambda q, k, v: cudnn_attention(scoring, q, k, v, segments), q, k, v)

  text = jax.jit(gradients).trace(q, k, k, segments).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("__cudnn$fmhaScaleBiasSoftmax(") == 1
  assert text.count("__cudnn$fmhaScaleBiasSoftmaxBackward(") == 1


@pytest.mark.parametrize(
  ("changes", "taken"),
  [
    ({}, True),
    ({"window": 100}, True),
    ({"width": 80}, True),
    ({"width": 256}, False),
    ({"length": 1000}, False),
    ({"length": 16384}, False),
    ({"dtype": jnp.float32}, False),
    ({"softcap": 50.0}, False),
    ({"sinks": jnp.zeros((2, 3))}, False),
  ],
)
def test_attention_that_cudnn_lacks_a_feature_for_is_left_to_the_loop(changes, taken):
  given = {"window": None, "width": 128, "length": 1024, "dtype": jnp.bfloat16, "softcap": None, "sinks": None}
  given |= changes
  q = jnp.zeros((1, 2, 3, given["length"], given["width"]), given["dtype"])
  assert cudnn_takes(Scoring(1.0, given["softcap"], given["window"]), q, given["sinks"]) == taken
