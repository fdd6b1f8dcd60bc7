"""Rotary position embedding."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def frequencies(
  head_dim: int, *, theta: float, fraction: float = 1.0, llama3: tuple[float, float, float, int] | None = None
) -> np.ndarray:
  """Radians a position for each rotated pair, float32.

  Args:
    head_dim: Width of a head.
    theta: Base of the frequencies.
    fraction: Part of the head width that is rotated, from the left.
    llama3: (factor, low_freq_factor, high_freq_factor, original_max_positions): wave lengths beyond the original
      context are stretched by `factor`, short ones stay, those between are blended (Llama 3.1).
  """
  rotated = int(head_dim * fraction)
  inverse = (1.0 / theta ** (np.arange(0, rotated, 2, dtype=np.float32) / rotated)).astype(np.float32)
  if llama3 is not None:
    factor, low, high, original = llama3
    turns = original * inverse / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    inverse = ((1 - blend) * inverse / factor + blend * inverse).astype(np.float32)
  return inverse


def rotate(
  x_BTNH: Float[Array, "*B N H"], *, positions: Int[Array, "*B"], inverse: np.ndarray
) -> Float[Array, "*B N H"]:
  """The pairs (i, i + R / 2) of the first R = 2 * len(inverse) channels turned by position * inverse[i].

  Computed in float32 and returned in x's dtype; channels past R are left as they are (Su et al. 2021, 2104.09864).
  """
  half = len(inverse)
  angle = positions[..., None, None].astype(jnp.float32) * inverse
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  x32 = x_BTNH.astype(jnp.float32)
  first, second, rest = x32[..., :half], x32[..., half : 2 * half], x32[..., 2 * half :]
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
  return turned.astype(x_BTNH.dtype)
