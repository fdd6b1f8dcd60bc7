"""Causal depthwise convolution that stays within documents, and what decoding keeps of its inputs."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def causal_conv(
  x: Float[Array, "B T I"], kernel: Float[Array, "W I"], *, segments: Int[Array, "B T"]
) -> Float[Array, "B T I"]:
  """y[t] = Σ_w kernel[w] * x[t − (W − 1) + w] over the taps in t's own document, in float32."""
  width, length = kernel.shape[0], x.shape[1]
  x32 = x.astype(jnp.float32)
  y = x32 * kernel[-1]
  for back in range(1, min(width, length)):
    shifted = jnp.pad(x32, ((0, 0), (back, 0), (0, 0)))[:, :length]
    before = jnp.pad(segments, ((0, 0), (back, 0)), constant_values=-1)[:, :length]
    y = y + jnp.where((before == segments)[..., None], shifted, 0.0) * kernel[-1 - back]
  return y


def last_inputs(x: Float[Array, "B T I"], *, lengths: Int[Array, " B"], count: int) -> Float[Array, "B C I"]:
  """The last `count` positions of rows of `lengths` positions, oldest first; zeros before the first."""
  index = lengths[:, None] - count + jnp.arange(count)
  taken = jnp.take_along_axis(x, jnp.clip(index, 0, x.shape[1] - 1)[..., None], axis=1)
  return jnp.where((index >= 0)[..., None], taken, 0)
