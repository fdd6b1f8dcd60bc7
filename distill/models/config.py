"""Architectures as data: a decoder is a tuple of layer kinds."""

import dataclasses
from collections.abc import Sequence

from distill.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
  """Rotary position embedding (Su et al. 2021, 2104.09864).

  Attributes:
    theta: Base of the frequencies.
    fraction: Part of the head width that is rotated.
    llama3: (factor, low_freq_factor, high_freq_factor, original_max_positions) of Llama 3's long-context scaling.
  """

  theta: float = 10_000.0
  fraction: float = 1.0
  llama3: tuple[float, float, float, int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
  """Causal softmax attention with grouped key/value heads.

  Attributes:
    gated: The output is multiplied by sigmoid of a second projection (Qwen 3.5).
    qk_norm: Queries and keys are RMS-normalised per head.
    use_bias: Biases on q, k, v.
    use_out_bias: Bias on the output projection.
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope: Rope
  gated: bool = False
  qk_norm: bool = False
  use_bias: bool = False
  use_out_bias: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDelta:
  """Gated-delta-rule linear attention (Yang et al. 2024, 2412.06464), as in Qwen 3.5."""

  num_key_heads: int
  num_value_heads: int
  key_head_dim: int
  value_head_dim: int
  conv_width: int = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mlp:
  """Gated MLP: down(silu(gate(x)) * up(x))."""

  width: int
  use_bias: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
  """One residual block: a sequence mixer, then an MLP."""

  mixer: Attention | GatedDelta
  mlp: Mlp


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """A decoder-only language model.

  Attributes:
    family: Name of the HF family that its checkpoints are read from and written to.
    norm_offset: 1.0 when norm scales are stored as differences from one (Qwen 3.5), else 0.0.
    max_positions: Longest sequence the HF configuration promises.
  """

  family: str
  vocab_size: int
  width: int
  layers: tuple[LayerConfig, ...]
  norm_eps: float = 1e-6
  norm_offset: float = 0.0
  tie_embeddings: bool = False
  max_positions: int = 2048


@dataclasses.dataclass(frozen=True)
class Group:
  """Layers start .. start + repeats * len(pattern) - 1: `pattern`, `repeats` times over."""

  start: int
  pattern: tuple[LayerConfig, ...]
  repeats: int

  def layer(self, repeat: int, position: int) -> int:
    """Index in the decoder of one layer of the group."""
    return self.start + repeat * len(self.pattern) + position


def groups(layers: Sequence[LayerConfig]) -> tuple[Group, ...]:
  """Layers cut into repeated patterns, the shortest that cover most; a left-over is a group of its own."""
  layers = tuple(layers)
  if not layers:
    raise InputError("layers: a decoder needs at least one layer")
  best = (layers, 1)
  for period in range(1, len(layers) // 2 + 1):
    repeats = len(layers) // period
    if layers[: period * repeats] == layers[:period] * repeats:
      best = (layers[:period], repeats)
      break
  covered = len(best[0]) * best[1]
  head = (Group(0, *best),)
  rest = layers[covered:]
  if not rest:
    return head
  return head + tuple(dataclasses.replace(group, start=group.start + covered) for group in groups(rest))
