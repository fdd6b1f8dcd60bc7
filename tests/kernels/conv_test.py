import jax.numpy as jnp
import numpy as np
import pytest

from distill.kernels.conv import causal_conv, causal_conv_reference
from tests.kernels.precision import assert_equal_up_to_rounding, in_float64, segment_numbers, value_and_gradients


@pytest.mark.parametrize(("length", "taps"), [(1, 4), (2, 4), (3, 1), (9, 4), (30, 3)])
def test_causal_conv_equals_its_definition_in_value_and_gradient(length, taps):
  rng = np.random.default_rng(0)
  given = [rng.normal(size=shape).astype(np.float32) for shape in ((2, length, 3), (taps, 3))]
  segments = segment_numbers((2, length), share=0.3)

  def run(function):
    return lambda x, kernel: function(x, kernel, segments=jnp.asarray(segments))

  got = value_and_gradients(run(causal_conv), *map(jnp.asarray, given))
  # The longest sum is the gradient of a tap, over rows and positions.
  assert_equal_up_to_rounding(got, in_float64(run(causal_conv_reference), *given), roundings=2 * length + taps)


def test_causal_conv_reference_pads_each_segment_with_zeros():
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(1, 9, 2)), rng.normal(size=(4, 2))
  segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 2, 0]])
  got = causal_conv_reference(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32), segments=segments)
  for part in (slice(0, 3), slice(3, 8)):
    padded = np.concatenate([np.zeros((3, 2)), x[0, part]])
    expected = [(padded[t : t + 4] * kernel).sum(0) for t in range(part.stop - part.start)]
    np.testing.assert_allclose(got[0, part], expected, atol=1e-5)
