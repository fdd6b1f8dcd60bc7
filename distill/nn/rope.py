"""Rotary position embedding, and the ways in which its frequencies are stretched for long contexts."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interpolation:
  """Every frequency divided by `factor` (Chen et al. 2023, 2306.15595)."""

  factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicNtk:
  """The base grows with the length of a document once it passes `max_positions`."""

  factor: float
  max_positions: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3:
  """Wave lengths beyond the original context are stretched, short ones stay, those between are blended (Llama 3.1)."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_positions: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
  """Frequencies that turn less than `beta_slow` times in the original context are stretched, those that turn more than
  `beta_fast` times stay, with a ramp between (Peng et al. 2023, 2309.00071).

  Attributes:
    attention_factor: Multiplies the rotated queries and keys.
    truncate: The ramp begins and ends at whole channels.
  """

  factor: float
  original_max_positions: int
  attention_factor: float
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRope:
  """A divisor for every frequency: `short` up to the original context, `long` past it (Ding et al. 2024, 2402.13753).

  Attributes:
    attention_factor: Multiplies the rotated queries and keys.
  """

  short: tuple[float, ...]
  long: tuple[float, ...]
  original_max_positions: int
  attention_factor: float


Scaling = Interpolation | DynamicNtk | Llama3 | Yarn | LongRope


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
  """Rotary position embedding (Su et al. 2021, 2104.09864).

  Attributes:
    theta: Base of the frequencies.
    fraction: Part of the head width that is rotated, from the left.
    scaling: How frequencies are stretched, if at all.
  """

  theta: float = 10_000.0
  fraction: float = 1.0
  scaling: Scaling | None = None

  @property
  def attention_factor(self) -> float:
    """What rotated queries and keys are multiplied by."""
    return self.scaling.attention_factor if isinstance(self.scaling, Yarn | LongRope) else 1.0

  @property
  def by_length(self) -> bool:
    """Frequencies depend on the length of a document."""
    return isinstance(self.scaling, DynamicNtk | LongRope)


def frequencies(head_dim: int, *, rope: RopeConfig, length: int) -> tuple[Float[np.ndarray, "Rows Half"], int]:
  """Radians a position for each rotated pair, float32, and the length from which on the rows differ.

  A document of n positions, n at most `length`, takes row clip(n − first, 0, last row); there is more than one row only
  where frequencies depend on the length of a document.
  """
  rotated = int(head_dim * rope.fraction)
  exponent = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
  scaling, theta = rope.scaling, np.float32(rope.theta)
  if isinstance(scaling, DynamicNtk):
    first = scaling.max_positions
    lengths = np.arange(first, max(first, length) + 1, dtype=np.float32)
    growth = np.float32(scaling.factor) * lengths / np.float32(first) - np.float32(scaling.factor - 1)
    theta_R = theta * growth ** np.float32(rotated / (rotated - 2))
    return (1.0 / theta_R[:, None] ** exponent).astype(np.float32), first
  powers = theta**exponent
  if isinstance(scaling, LongRope):
    rows = [scaling.short] + [scaling.long] * (length > scaling.original_max_positions)
    divided = np.stack([1.0 / (np.asarray(row, np.float32) * powers) for row in rows])
    return divided.astype(np.float32), scaling.original_max_positions
  inverse: np.ndarray = 1.0 / powers
  if isinstance(scaling, Interpolation):
    inverse = inverse / np.float32(scaling.factor)
  elif isinstance(scaling, Llama3):
    turns = scaling.original_max_positions * inverse / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    inverse = (1 - blend) * inverse / scaling.factor + blend * inverse
  elif isinstance(scaling, Yarn):
    stretched = _yarn_ramp(scaling, rotated=rotated, theta=rope.theta)
    inverse = inverse * (1 - stretched) + inverse / np.float32(scaling.factor) * stretched
  return inverse.astype(np.float32)[None], 0


def _yarn_ramp(yarn: Yarn, *, rotated: int, theta: float) -> np.ndarray:
  """How far each frequency is stretched, 0 to 1."""

  def channel(turns: float) -> float:
    return rotated * math.log(yarn.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

  low, high = channel(yarn.beta_fast), channel(yarn.beta_slow)
  if yarn.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, rotated - 1)
  if low == high:
    high += 0.001
  order = np.arange(rotated // 2, dtype=np.float32)
  return np.clip((order - np.float32(low)) / np.float32(high - low), 0.0, 1.0)


def document_lengths(segments: Int[Array, "B T"], *, positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
  """Number of positions of the document that each position is in."""
  same = segments[:, :, None] == segments[:, None, :]
  return jnp.max(jnp.where(same, positions[:, None, :] + 1, 0), axis=-1)


def rotate(
  x_BTNH: Float[Array, "*B N H"],
  *,
  positions: Int[Array, "*B"],
  inverse: Float[np.ndarray, " Half"] | Float[Array, "*B Half"],
  factor: float = 1.0,
) -> Float[Array, "*B N H"]:
  """The pairs (i, i + R / 2) of the first R = 2 * Half channels turned by position * inverse[i], times `factor`.

  Computed in float32 and returned in x's dtype; channels past R are left as they are.
  """
  half = inverse.shape[-1]
  angle = (positions[..., None].astype(jnp.float32) * inverse)[..., None, :]
  cos, sin = jnp.cos(angle) * factor, jnp.sin(angle) * factor
  x32 = x_BTNH.astype(jnp.float32)
  first, second, rest = x32[..., :half], x32[..., half : 2 * half], x32[..., 2 * half :]
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
  return turned.astype(x_BTNH.dtype)
