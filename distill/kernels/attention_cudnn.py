"""Causal softmax attention on an NVIDIA GPU, by cuDNN's flash attention."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distill.kernels.attention_loop import Scoring

# cuDNN takes segments as a mask [B, 1, T, T] in bfloat16, and returns the gradient of it: 0.27 GB a row at T 8,192.
_MAX_LENGTH = 8192
# cuDNN's tiles: other lengths are restricted in the backward pass.
_TILE = 64


def cudnn_takes(scoring: Scoring, q: Float[Array, "B K G T H"], sinks: Float[Array, "K G"] | None) -> bool:
  """Returns whether cuDNN has all that this attention needs: no softcap, no sinks, heads of 16-bit numbers."""
  length, width = q.shape[3:]
  plain = scoring.softcap is None and sinks is None
  return plain and q.dtype == jnp.bfloat16 and width <= 128 and width % 8 == 0 and _short(length)


def _short(length: int) -> bool:
  return length % _TILE == 0 and length <= _MAX_LENGTH


def cudnn_attention(
  scoring: Scoring,
  q: Float[Array, "B K G T H"],
  k: Float[Array, "B K T H"],
  v: Float[Array, "B K T H"],
  segments: Int[Array, "B T"],
) -> Float[Array, "B K G T H"]:
  """Computes `attention` by cuDNN, where `cudnn_takes` it; the result is rounded to q's dtype.

  The mask holds segments and window, since cuDNN's own window excludes a mask. cuDNN skips what is above the diagonal.

  Args: as `attention`.
  """
  batch, keys, group, length, width = q.shape
  mask = segments[:, :, None] == segments[:, None, :]
  if scoring.window is not None:
    distance = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    mask &= (distance < scoring.window)[None]
  q = q.reshape(batch, keys * group, length, width)
  q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
  out = jax.nn.dot_product_attention(
    q, k, v, mask=mask[:, None], scale=scoring.scale, is_causal=True, implementation="cudnn"
  )
  return out.transpose(0, 2, 1, 3).reshape(batch, keys, group, length, width).astype(jnp.float32)
