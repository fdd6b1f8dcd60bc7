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
  """Configuration of one layer: a mixer, then an MLP or a mixture of experts; `mlp` is None for a mixer alone."""

  mixer: MixerConfig
  mlp: MlpConfig | MoeConfig | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """Architecture of a decoder-only language model.

  Attributes:
    family: Hugging Face `model_type` whose checkpoint format the model is read from and written to.
    vocab_size: Number of tokens V.
    width: Model width D.
    layers: Configurations of the layers, first to last.
    norm: 'rms', or 'layer' for LayerNorm with mean and bias.
    norms: Position of the norms of mixers and MLPs: 'pre' on the input, 'post' on the output, or 'both'.
    norm_eps: Epsilon of all norms.
    norm_offset: Added to stored norm scales: 1.0 in families that store them as differences from one (Gemma, Qwen 3.5).
    tie_embeddings: Uses the transposed embedding table as the head.
    learned_positions: Adds a trainable position embedding, one for each of `max_positions`, to the token embedding.
    embed_scale: Multiplies embeddings.
    round_embed_scale: Rounds `embed_scale` to the dtype of the computation before its use, as in the training of Gemma.
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
    """True if the output at a position depends on its document's length, or if there are learned positions."""
    return self.learned_positions or any(layer.mixer.bound_to_length for layer in self.layers)

  def check_length(self, length: int, *, what: str) -> None:
    """Raises an error if documents of `length` tokens need more learned positions than the model has.

    Args:
      length: Number of tokens of the longest document.
      what: The key, flag or input that determines `length`; the error message begins with it.

    Raises:
      InputError: The model has learned positions, but fewer than `length`.
    """
    if self.learned_positions and length > self.max_positions:
      raise InputError(
        f"{what}: {length} tokens are too many, because the model has learned embeddings for {self.max_positions} "
        f"positions; use at most {self.max_positions} tokens"
      )


@dataclasses.dataclass(frozen=True)
class Group:
  """Consecutive layers that repeat a pattern; the layers at the same position of the pattern are stacked and scanned.

  Attributes:
    start: Index of the first layer in the decoder.
    pattern: The layers of one repeat.
    repeats: Number of times that the pattern occurs.
  """

  start: int
  pattern: tuple[LayerConfig, ...]
  repeats: int

  def layer(self, repeat: int, position: int) -> int:
    """Returns the index in the decoder of the layer at `position` in repeat `repeat` of the pattern, from 0."""
    return self.start + repeat * len(self.pattern) + position


def singles(layers: Sequence[LayerConfig]) -> tuple[Group, ...]:
  """Puts each layer into a group of its own, which occurs once."""
  return tuple(Group(i, (layer,), 1) for i, layer in enumerate(layers))


def groups(layers: Sequence[LayerConfig]) -> tuple[Group, ...]:
  """Groups layers into repeated patterns, so that each pattern compiles once.

  The first group has the shortest pattern whose repeats leave fewer layers than one pattern at the end. If there is
  none, the group has all layers once. The layers that are left are grouped in the same way.

  Raises:
    InputError: There are no layers.
  """
  layers = tuple(layers)
  if not layers:
    raise InputError("layers: the decoder has no layers; give the configuration of at least one layer")
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
