"""Norms over the last axis."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from distill.nn.param import Init, ones, zeros


class RMSNorm(nnx.Module):
  """RMS norm: x / rms(x) times a trainable scale (Zhang & Sennrich 2019, 1910.07467).

  Args:
    init: Creates the parameters of the module.
    width: Size of the normalised last axis.
    eps: Added to the mean square.
    offset: Added to the stored scale: 1.0 if the model stores the scale as its difference from one, else 0.0.
    groups: Number of equal parts that the axis is cut into; each part is divided by its own root mean square.
  """

  def __init__(self, init: Init, *, width: int, eps: float, offset: float = 0.0, groups: int = 1):
    self.scale = init.param("scale", shape=(width,), axes=(None,), init=zeros if offset else ones)
    self.eps, self.offset, self.groups = eps, offset, groups

  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Normalises x in float32; the result has x's dtype."""
    x32 = x.astype(jnp.float32).reshape(*x.shape[:-1], self.groups, -1)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
    y = y.reshape(x.shape)
    return (y * jnp.broadcast_to(self.offset + self.scale[...], y.shape)).astype(x.dtype)


class LayerNorm(nnx.Module):
  """Layer norm: (x − mean) / standard deviation, times a trainable scale, plus a bias (Ba et al. 2016, 1607.06450).

  Args:
    init: Creates the parameters of the module.
    width: Size of the normalised last axis.
    eps: Added to the variance.
  """

  def __init__(self, init: Init, *, width: int, eps: float):
    self.scale = init.param("scale", shape=(width,), axes=(None,), init=ones)
    self.bias = init.param("bias", shape=(width,), axes=(None,), init=zeros)
    self.eps = eps

  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Normalises x in float32; the result has x's dtype."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
    scale, bias = (jnp.broadcast_to(one[...], y.shape) for one in (self.scale, self.bias))
    return (y * scale + bias).astype(x.dtype)
