"""Causal depthwise convolution that stays within documents."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def causal_conv(
  x: Float[Array, "B T I"], kernel: Float[Array, "W I"], *, segments: Int[Array, "B T"]
) -> Float[Array, "B T I"]:
  """y[t] = Σ_w kernel[w] * x[t − (W − 1) + w] over the taps in t's own document, in float32."""
  return _conv(x.astype(jnp.float32), kernel, segments)


def _taps(kernel, segments):
  """(positions back, tap, whether that position is of the same document [B,T,1])"""
  length = segments.shape[1]
  for back in range(min(len(kernel), length)):
    before = jnp.pad(segments, ((0, 0), (back, 0)), constant_values=-1)[:, :length]
    yield back, kernel[-1 - back], (before == segments)[..., None]


def _shifted(x, back):
  return jnp.pad(x, ((0, 0), (back, 0), (0, 0)))[:, : x.shape[1]]


@jax.custom_vjp
def _conv(x, kernel, segments):
  return sum(jnp.where(same, _shifted(x, back), 0.0) * tap for back, tap, same in _taps(kernel, segments))


def _forward(x, kernel, segments):
  return _conv(x, kernel, segments), (x, kernel, segments)


def _backward(saved, cotangent):
  x, kernel, segments = saved
  pulled, taps = jnp.zeros_like(x), []
  ones = jnp.ones((1, x.shape[0] * x.shape[1]), jnp.float32)
  for back, tap, same in _taps(kernel, segments):
    masked = jnp.where(same, cotangent, 0.0)
    pulled = pulled + jnp.pad(masked, ((0, 0), (0, back), (0, 0)))[:, back:] * tap
    # A product with ones: XLA's CPU sums over leading axes run down one column after another.
    taps.append(ones @ (masked * _shifted(x, back)).reshape(ones.shape[1], -1))
  taps += [jnp.zeros_like(taps[0])] * (len(kernel) - len(taps))
  return pulled, jnp.concatenate(taps[::-1]), None


_conv.defvjp(_forward, _backward)
