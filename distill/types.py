"""The shape alphabet and the values that travel from a batch to a loss.

B batch, T query position, S key position, D model width, F MLP width, N query heads, K key/value heads,
H head width, V vocabulary, L layers, R LoRA rank, C chunk.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distill.kernels.matmul import matmul

_pytree = jax.tree_util.register_dataclass
# The number, among captured layers, of what the first one is given.
INPUT = -1


def before(layer: int) -> int:
  """The layer whose output `layer` is given."""
  return layer - 1 if layer else INPUT


@_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class Readout:
  """How a final hidden state becomes logits: softcap(scale * (hidden @ kernel + bias)).

  Attributes:
    kernel: Columns past `vocab_size` are padding and never get probability.
    bias: Added before the softcap, if any.
    softcap: cap * tanh(logits / cap), if any.
    scale: Multiplier of the logits.
    vocab_size: True vocabulary size, at most the kernel's width.
  """

  kernel: Float[Array, "D V"]
  bias: Float[Array, " V"] | None = None
  softcap: float | None = dataclasses.field(default=None, metadata={"static": True})
  scale: float = dataclasses.field(default=1.0, metadata={"static": True})
  vocab_size: int = dataclasses.field(metadata={"static": True})

  def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Float32 logits over the padded vocabulary; padding columns hold the lowest finite float.

    Operands keep the kernel's dtype after casting `hidden` to it; sums are float32.
    """
    return self.finish(matmul(hidden.astype(self.kernel.dtype), jnp.asarray(self.kernel)))

  def finish(self, logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """Logits from hidden @ kernel: bias, scale, softcap and padding."""
    if self.bias is not None:
      logits = logits + self.bias.astype(jnp.float32)
    logits = logits * self.scale
    if self.softcap is not None:
      logits = self.softcap * jnp.tanh(logits / self.softcap)
    width = self.kernel.shape[-1]
    if width != self.vocab_size:
      logits = jnp.where(jnp.arange(width) < self.vocab_size, logits, jnp.finfo(jnp.float32).min)
    return logits


@_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOutput:
  """What a decoder gives for a batch.

  Attributes:
    hidden: Final hidden state, after the final norm.
    captured: Output of the decoder layers asked for, in the order asked, before the final norm; of `INPUT`, what the
      first layer is given.
    readout: Turns `hidden` into logits.
    mixed: What the mixers asked for add to the residual stream, in the order asked.
    balance: How evenly each row's tokens use the experts, 1 the most even: the mean over layers with a mixture, None
      without such layers or in decoding.
  """

  hidden: Float[Array, "B T D"]
  captured: tuple[Float[Array, "B T D"], ...]
  readout: Readout
  mixed: tuple[Float[Array, "B T D"], ...] = ()
  balance: Float[Array, " B"] | None = None


# Queries, keys and values of a layer, all heads side by side, or what stands for them in other mixers.
Related = tuple[Float[Array, "B T I"], ...]


@_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class Apart:
  """Layers that were run by themselves, the first two each on an input of the teacher's.

  Attributes:
    mixed: What mixers add to the residual stream.
    blocks: Outputs of whole layers.
    related: Queries, keys and values, on what the layer is given when the student runs end to end.
  """

  mixed: tuple[Float[Array, "B T D"], ...] = ()
  blocks: tuple[Float[Array, "B T D"], ...] = ()
  related: tuple[Related, ...] = ()


@_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseTarget:
  """What is kept of a teacher's next-token distribution: some ids with their probability, and the rest as one bucket.

  Attributes:
    ids: Tokens of the support, each once a token; -1 marks a place that is not used.
    log_probs: Their log-probabilities at the temperature the target was made with; sampled ones are log(count / draws).
    tail: Log-probability of everything else; -inf or below -10⁴ for none.
  """

  ids: Int[Array, "*B k"]
  log_probs: Float[Array, "*B k"]
  tail: Float[Array, "*B"]


@_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseSignal:
  """A teacher's whole next-token distribution, as (hidden, readout), and the layers and mixers that were asked for."""

  hidden: Float[Array, "B T D"]
  readout: Readout
  captured: tuple[Float[Array, "B T D"], ...] = ()
  mixed: tuple[Float[Array, "B T D"], ...] = ()
  related: tuple[Related, ...] = ()


@_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseSignal:
  """What is kept of a teacher's next-token distributions, and the layers and mixers that were asked for."""

  target: SparseTarget
  captured: tuple[Float[Array, "B T D"], ...] = ()
  mixed: tuple[Float[Array, "B T D"], ...] = ()


TeacherSignal = DenseSignal | SparseSignal


@_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
  """Packed rows of tokens, cut into documents.

  Attributes:
    tokens: Token ids.
    segments: Number of the document within its row, from 1; 0 marks padding.
    positions: Position within the document, from 0.
    loss_mask: Weight of PREDICTING `tokens[:, t + 1]` from position t, 0 or 1: the last position of a document
      and padding have 0.
    routes: Number of the adapter set that teaches each row; absent: all 0.
    cached: What a cache has kept of the teacher for these rows.
  """

  tokens: Int[Array, "B T"]
  segments: Int[Array, "B T"]
  positions: Int[Array, "B T"]
  loss_mask: Float[Array, "B T"]
  routes: Int[Array, " B"] | None = None
  cached: SparseSignal | None = None
