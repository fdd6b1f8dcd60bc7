"""A causal depthwise convolution that stays within documents."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from distill.kernels.conv import causal_conv
from distill.nn.param import Init, zeros


class ShortConv(nnx.Module):
  """A causal depthwise convolution. Decoding carries its last W − 1 inputs, the window, from step to step.

  Args:
    init: Creates the parameters of the module.
    width: Number of taps W.
    channels: Number of channels I.
    axis: Logical axis of the channels, which decides how they are sharded; None replicates them.
    use_bias: Adds a bias.
  """

  def __init__(self, init: Init, *, width: int, channels: int, axis: str | None, use_bias: bool):
    bound = width**-0.5
    self.kernel = init.param(
      "kernel",
      shape=(width, channels),
      axes=(None, axis),
      init=lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound),
    )
    self.bias = init.param("bias", shape=(channels,), axes=(axis,), init=zeros) if use_bias else None

  def _biased(self, y):
    return y if self.bias is None else y + jnp.broadcast_to(self.bias[...], y.shape)

  def __call__(self, x: Float[Array, "B T I"], *, segments: Int[Array, "B T"]) -> Float[Array, "B T I"]:
    """Convolves each document separately; the result is float32."""
    return self._biased(causal_conv(x, self.kernel[...], segments=segments))

  def empty_window(self, batch: int) -> Float[Array, "B window I"]:
    """Returns the window before the first position of a document: zeros, float32; its axis `window` has size W − 1."""
    width, channels = self.kernel.shape[-2:]
    return jnp.zeros((batch, width - 1, channels), jnp.float32)

  def window(self, x: Float[Array, "B T I"], *, lengths: Int[Array, " B"]) -> Float[Array, "B window I"]:
    """Returns the window from which `step` continues each row after its first `lengths` positions, float32.

    W is the number of taps. The window holds the last W − 1 inputs of these positions. Inputs before the start of the
    row count as zeros.
    """
    x = jnp.concatenate([self.empty_window(x.shape[0]), x.astype(jnp.float32)], axis=1)
    rows = lengths[:, None] + jnp.arange(self.kernel.shape[-2] - 1)[None, :]
    return jnp.take_along_axis(x, rows[..., None], axis=1)

  def step(
    self, x: Float[Array, "B I"], *, window: Float[Array, "B window I"]
  ) -> tuple[Float[Array, "B I"], Float[Array, "B window I"]]:
    """Convolves the next position of each row, whose input is `x`; returns (output, next window), float32.

    W is the number of taps. A window holds the last W − 1 inputs of each row: `window` ends at the position before this
    one, and the returned window ends at this one.
    """
    window = jnp.concatenate([window, x.astype(jnp.float32)[:, None]], axis=1)
    return self._biased(jnp.einsum("bwi,wi->bi", window, self.kernel[...])), window[:, 1:]
