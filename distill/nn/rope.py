"""Rotary position embedding (RoPE), and scaling of its frequencies for long contexts."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interpolation:
  """Linear interpolation: divides every frequency by `factor` (Chen et al. 2023, 2306.15595)."""

  factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicNtk:
  """Dynamic NTK scaling: raises the base of the frequencies for documents longer than `max_positions`.

  A document of n tokens multiplies the base by (factor · n / max_positions − factor + 1) ** (d / (d − 2)), where d is
  the number of rotated channels.
  """

  factor: float
  max_positions: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3:
  """Llama 3.1 scaling: divides low frequencies by `factor`, leaves high ones unchanged and interpolates in between.

  Attributes:
    factor: Divisor of the low frequencies.
    low_freq_factor: Frequencies with fewer turns than this in the original context are divided.
    high_freq_factor: Frequencies with more turns than this in the original context are unchanged.
    original_max_positions: Length of the original context, before scaling.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_positions: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
  """YaRN scaling: divides low frequencies by `factor`, leaves high ones unchanged and has a linear ramp in between.

  The method is that of Peng et al. 2023, 2309.00071.

  Attributes:
    factor: Divisor of the low frequencies.
    original_max_positions: Length of the original context, before scaling.
    attention_factor: Multiplies the rotated queries and keys.
    beta_fast: Frequencies with more turns than this in the original context are unchanged.
    beta_slow: Frequencies with fewer turns than this in the original context are divided.
    truncate: Rounds the start and the end of the ramp to whole channel numbers.
  """

  factor: float
  original_max_positions: int
  attention_factor: float
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRope:
  """LongRoPE scaling: divides each frequency by its own factor (Ding et al. 2024, 2402.13753).

  Attributes:
    short: Divisor of each frequency, for documents up to the original context length.
    long: Divisor of each frequency, for longer documents.
    original_max_positions: Length of the original context, before scaling.
    attention_factor: Multiplies the rotated queries and keys.
  """

  short: tuple[float, ...]
  long: tuple[float, ...]
  original_max_positions: int
  attention_factor: float


Scaling = Interpolation | DynamicNtk | Llama3 | Yarn | LongRope


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
  """Configuration of the rotary position embedding (Su et al. 2021, 2104.09864).

  Attributes:
    theta: Base of the frequencies.
    fraction: Fraction of the head width that is rotated, from the first channel on.
    scaling: Scaling of the frequencies for long contexts; None leaves them unchanged.
  """

  theta: float = 10_000.0
  fraction: float = 1.0
  scaling: Scaling | None = None

  @property
  def attention_factor(self) -> float:
    """Multiplier of the rotated queries and keys; 1.0 unless the scaling has one."""
    return self.scaling.attention_factor if isinstance(self.scaling, Yarn | LongRope) else 1.0

  @property
  def by_length(self) -> bool:
    """True if the frequencies depend on the length of the document."""
    return isinstance(self.scaling, DynamicNtk | LongRope)


def frequencies(head_dim: int, *, rope: RopeConfig, length: int) -> tuple[Float[np.ndarray, "Rows Half"], int]:
  """Returns the rotary frequencies: the angle per position of each rotated pair of channels.

  Args:
    head_dim: Head width.
    rope: Configuration of the rotary position embedding.
    length: Length of the longest document.

  Returns:
    (frequencies, first): frequencies in radians per position, float32, and the document length that row 0 is for. A
    document of n positions uses row n − first, or the nearest row that exists. There is only one row unless the
    frequencies depend on the length of the document.
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
  """Returns a weight for each frequency: 0 leaves the frequency unchanged, 1 divides it by `yarn.factor`."""

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
  """Returns the length of the document that each position belongs to."""
  same = segments[:, :, None] == segments[:, None, :]
  return jnp.max(jnp.where(same, positions[:, None, :] + 1, 0), axis=-1)


def rotate(
  x_BTNH: Float[Array, "*B N H"],
  *,
  positions: Int[Array, "*B"],
  inverse: Float[np.ndarray, " Half"] | Float[Array, "*B Half"],
  factor: float = 1.0,
) -> Float[Array, "*B N H"]:
  """Rotates pairs of channels by angles that grow with the position.

  Args:
    x_BTNH: Queries or keys.
    positions: Position of each token within its document.
    inverse: Rotary frequencies from `frequencies`: one set for all tokens, or one for each token.
    factor: Multiplies the rotated channels.

  Returns:
    x_BTNH with the channels i and i + Half rotated as a pair, for each i < Half, in its own dtype; the computation is
    float32. Channels from 2 · Half on are unchanged.
  """
  half = inverse.shape[-1]
  inverse = jnp.broadcast_to(inverse, (*positions.shape, half))
  angle = (positions[..., None].astype(jnp.float32) * inverse)[..., None, :]
  cos, sin = jnp.cos(angle) * factor, jnp.sin(angle) * factor
  x32 = x_BTNH.astype(jnp.float32)
  first, second, rest = x32[..., :half], x32[..., half : 2 * half], x32[..., 2 * half :]
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
  return turned.astype(x_BTNH.dtype)
