"""Architectures as data: a decoder is a tuple of layer kinds."""

import dataclasses
from collections.abc import Sequence

from distill.errors import InputError
from distill.nn.attention import AttentionConfig as AttentionConfig
from distill.nn.gated_delta import GatedDeltaConfig as GatedDeltaConfig
from distill.nn.mamba2 import Mamba2Config as Mamba2Config
from distill.nn.mixer import MixerConfig
from distill.nn.mlp import MlpConfig
from distill.nn.moe import MoeConfig
from distill.nn.rope import RopeConfig as RopeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
  """One residual block: a sequence mixer, then an MLP, if any."""

  mixer: MixerConfig
  mlp: MlpConfig | MoeConfig | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """A decoder-only language model.

  Attributes:
    family: Name of the HF family that its checkpoints are read from and written to.
    norm: 'rms', or 'layer' for norms with mean and bias.
    norms: Where each mixer and MLP is normalised: 'pre' on its input, 'post' on its output, 'both'.
    norm_offset: 1.0 when norm scales are stored as differences from one (Gemma, Qwen 3.5), else 0.0.
    tie_embeddings: The head is the embedding transposed.
    learned_positions: An embedding for each of `max_positions` positions is added to that of the token.
    embed_scale: Multiplies embeddings.
    round_embed_scale: It is rounded to the dtype of the computation first, as Gemma was trained.
    residual_scale: Multiplies what each mixer and MLP adds to the residual stream.
    logit_scale: Multiplies logits.
    logit_softcap: cap * tanh(logits / cap), if any.
    max_positions: Longest sequence the HF configuration promises.
  """

  family: str
  vocab_size: int
  width: int
  layers: tuple[LayerConfig, ...]
  norm: str = "rms"
  norms: str = "pre"
  norm_eps: float = 1e-6
  norm_offset: float = 0.0
  tie_embeddings: bool = False
  learned_positions: bool = False
  embed_scale: float = 1.0
  round_embed_scale: bool = False
  residual_scale: float = 1.0
  logit_scale: float = 1.0
  logit_softcap: float | None = None
  max_positions: int = 2048

  @property
  def bound_to_length(self) -> bool:
    """What is computed for a position depends on the length of its document, or there are positions for so many."""
    return self.learned_positions or any(layer.mixer.bound_to_length for layer in self.layers)


@dataclasses.dataclass(frozen=True)
class Group:
  """Layers start .. start + repeats * len(pattern) - 1: `pattern`, `repeats` times over."""

  start: int
  pattern: tuple[LayerConfig, ...]
  repeats: int

  def layer(self, repeat: int, position: int) -> int:
    """Index in the decoder of one layer of the group."""
    return self.start + repeat * len(self.pattern) + position


def singles(layers: Sequence[LayerConfig]) -> tuple[Group, ...]:
  """Every layer a group of its own."""
  return tuple(Group(i, (layer,), 1) for i, layer in enumerate(layers))


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
