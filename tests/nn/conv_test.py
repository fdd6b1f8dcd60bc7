import jax
import jax.numpy as jnp
import numpy as np

from distill.nn.conv import ShortConv
from distill.nn.param import Init
from tests.kernels.precision import assert_equal_up_to_rounding


def test_short_conv_steps_after_a_prompt_of_any_length_equal_one_convolution_of_the_whole_row():
  conv = ShortConv(Init(jax.random.key(0)), width=4, channels=3, axis=None, use_bias=True)
  conv.bias[...] = jnp.arange(3.0)
  x, lengths = jax.random.normal(jax.random.key(1), (3, 9, 3)), jnp.asarray([0, 2, 6])
  whole = conv(x, segments=jnp.ones((3, 9), int))
  window = conv.window(x[:, :6], lengths=lengths)
  np.testing.assert_array_equal(window[:1], conv.empty_window(1))
  for ahead in range(3):
    at = jnp.arange(3), lengths + ahead
    y, window = conv.step(x[at], window=window)
    assert_equal_up_to_rounding(y, whole[at], roundings=8 * 5)
