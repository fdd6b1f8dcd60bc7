import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.kernels.conv import causal_conv


@pytest.mark.parametrize("length", [1, 3, 9])
def test_gradients_are_those_of_the_plain_sum_over_taps(length):
  rng = np.random.default_rng(0)
  x, kernel, weights = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2, length, 3), (4, 3), (3,)))
  segments = 1 + np.cumsum(rng.random((2, length)) < 0.3, axis=1)

  def plain(x, kernel):
    rows = []
    for t in range(length):
      taps = range(max(t - 3, 0), t + 1)
      rows.append(sum(x[:, s] * kernel[3 - t + s] * (segments[:, s] == segments[:, t])[:, None] for s in taps))
    return jnp.stack(rows, axis=1)

  def loss(convolve):
    return lambda x, kernel: jnp.sum(jnp.sin(convolve(x, kernel)) * weights)

  def ours(x, kernel):
    return causal_conv(x, kernel, segments=jnp.asarray(segments))

  np.testing.assert_allclose(ours(x, kernel), plain(x, kernel), atol=1e-6)
  expected = jax.grad(loss(plain), argnums=(0, 1))(x, kernel)
  for got, one in zip(jax.grad(loss(ours), argnums=(0, 1))(x, kernel), expected, strict=True):
    np.testing.assert_allclose(got, one, atol=2e-6)
