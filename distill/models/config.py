"""Configurations of decoders and their layers."""

import dataclasses

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
    """True if the length of a document matters to the model.

    Either the output at a position depends on this length, or learned positions limit it to `max_positions`.
    """
    return self.learned_positions or any(layer.mixer.bound_to_length for layer in self.layers)

  def check_length(self, length: int, *, what: str) -> None:
    """Checks that documents of `length` tokens fit the learned positions of the model, if it has any.

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
