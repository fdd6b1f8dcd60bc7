"""Configurations of decoders, and the grouping of their layers into repeated patterns."""

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
  """One layer: a sequence mixer, then an MLP or a mixture of experts; `mlp` is None for a mixer alone."""

  mixer: MixerConfig
  mlp: MlpConfig | MoeConfig | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """A decoder-only language model.

  Attributes:
    family: Name of the HF family that its checkpoints are read from and written to.
    vocab_size: Number of tokens V.
    width: Model width D.
    layers: Its layers, first to last.
    norm: 'rms', or 'layer' for LayerNorm with mean and bias.
    norms: Position of the norms of mixers and MLPs: 'pre' on the input, 'post' on the output, or 'both'.
    norm_eps: Epsilon of all norms.
    norm_offset: Added to stored norm scales: 1.0 in families that store them as differences from one (Gemma, Qwen 3.5).
    tie_embeddings: The head is the embedding transposed.
    learned_positions: Adds a trainable embedding of each of `max_positions` positions to that of the token.
    embed_scale: Multiplies embeddings.
    round_embed_scale: Rounds `embed_scale` to the dtype of the computation first, as in the training of Gemma.
    residual_scale: Multiplies the output of each mixer and MLP before it is added to the residual stream.
    logit_scale: Multiplies logits.
    logit_softcap: Logits become cap * tanh(logits / cap); None for no cap.
    max_positions: Longest sequence that the HF configuration declares.
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
    """True if an output depends on the length of its document, or if positions have trainable embeddings."""
    return self.learned_positions or any(layer.mixer.bound_to_length for layer in self.layers)

  def check_length(self, length: int, *, what: str) -> None:
    """Refuses documents that are longer than the model has position embeddings for.

    Args:
      length: Tokens of the longest document.
      what: The key or flag that asks for them; the message begins with it.

    Raises:
      InputError: The model has learned positions, but fewer than `length`.
    """
    if self.learned_positions and length > self.max_positions:
      raise InputError(
        f"{what}: {length} tokens, but the model has learned embeddings of {self.max_positions} positions; give fewer"
      )


@dataclasses.dataclass(frozen=True)
class Group:
  """Consecutive layers that repeat a pattern; the layers at one position of the pattern are stacked and scanned.

  Attributes:
    start: Index of the first layer in the decoder.
    pattern: The layers of one repeat.
    repeats: Number of times that the pattern occurs.
  """

  start: int
  pattern: tuple[LayerConfig, ...]
  repeats: int

  def layer(self, repeat: int, position: int) -> int:
    """Returns the index in the decoder of the layer at `position` of the pattern, in repeat number `repeat`, from 0."""
    return self.start + repeat * len(self.pattern) + position


def singles(layers: Sequence[LayerConfig]) -> tuple[Group, ...]:
  """Returns one group for each layer, without repeats."""
  return tuple(Group(i, (layer,), 1) for i, layer in enumerate(layers))


def groups(layers: Sequence[LayerConfig]) -> tuple[Group, ...]:
  """Groups layers into repeated patterns: the shortest that repeats from the first layer on, then the rest likewise.

  Raises:
    InputError: There are no layers.
  """
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
