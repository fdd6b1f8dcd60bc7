"""The shape alphabet and the values that travel from a batch to a loss.

B batch, T query position, S key position, D model width, F MLP width, N query heads, K key/value heads, G queries per
key head, H head width, E experts, V vocabulary, L layers, R LoRA rank, C chunk, M tokens (B·T flattened), P value
width of a mixer with a state [H, P], W convolution taps, I/O input/output width of a projection. A letter has one
meaning; k counts the tokens of a sparse target. Names of arrays inside a function may end in their axes: `logits_MV`.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distill.kernels.matmul import matmul

_pytree = jax.tree_util.register_dataclass
# The number, among captured layers, of the first layer's input: the embedded tokens.
INPUT = -1


def before(layer: int) -> int:
  """Returns the index of the layer whose output is the input of `layer`: layer − 1, or `INPUT` for layer 0."""
  return layer - 1 if layer else INPUT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capture:
  """A request to a forward pass: which activations to capture, that is, to return; `a | b` requests those of both.

  It is hashable, so that it can be a static argument of a jitted function. Each field is sorted, without duplicates.

  Attributes:
    layers: Layers whose outputs are captured, on the residual stream before the final norm; `INPUT` among them means
      the first layer's input.
    mixers: Layers whose mixer output is captured: what the mixer adds to the residual stream.
    qkv: Layers whose queries, keys and values are captured.
  """

  layers: tuple[int, ...] = ()
  mixers: tuple[int, ...] = ()
  qkv: tuple[int, ...] = ()

  def __post_init__(self):
    for field in dataclasses.fields(self):
      object.__setattr__(self, field.name, tuple(sorted(set(getattr(self, field.name)))))

  def __or__(self, other: "Capture") -> "Capture":
    return Capture(layers=self.layers + other.layers, mixers=self.mixers + other.mixers, qkv=self.qkv + other.qkv)


NO_CAPTURE = Capture()


@_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class Readout:
  """The map from a final hidden state to logits: softcap(scale * (hidden @ kernel + bias)).

  Attributes:
    kernel: Columns past `vocab_size` are padding and never get probability.
    bias: [V] vector added to hidden @ kernel, or None.
    softcap: Logits become softcap * tanh(logits / softcap); None for no cap.
    scale: Multiplier of the logits.
    vocab_size: True vocabulary size, at most the kernel's width.
  """

  kernel: Float[Array, "D V"]
  bias: Float[Array, " V"] | None = None
  softcap: float | None = dataclasses.field(default=None, metadata={"static": True})
  scale: float = dataclasses.field(default=1.0, metadata={"static": True})
  vocab_size: int = dataclasses.field(metadata={"static": True})

  def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Returns float32 logits over the padded vocabulary; padding columns hold the lowest finite float.

    `hidden` is cast to the kernel's dtype for the matmul, whose sums are float32.
    """
    return self.finish(matmul(hidden.astype(self.kernel.dtype), jnp.asarray(self.kernel)))

  def finish(self, logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """Turns hidden @ kernel into logits: adds the bias, scales, applies the softcap and masks the padding columns."""
    if self.bias is not None:
      logits = logits + jnp.broadcast_to(self.bias.astype(jnp.float32), logits.shape)
    logits = logits * self.scale
    if self.softcap is not None:
      logits = self.softcap * jnp.tanh(logits / self.softcap)
    width = self.kernel.shape[-1]
    if width != self.vocab_size:
      logits = jnp.where(jnp.arange(width) < self.vocab_size, logits, jnp.finfo(jnp.float32).min)
    return logits


# Queries, keys and values of a layer, each with all its heads side by side [B,T,I]; other mixers than attention return
# what stands for them.
Qkv = tuple[Float[Array, "B T _"], Float[Array, "B T _"], Float[Array, "B T _"]]


@_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOutput:
  """The output of a decoder for a batch; captured activations are keyed by layer index.

  Attributes:
    hidden: Final hidden state, after the final norm.
    readout: Turns `hidden` into logits.
    layers: Outputs of the layers in `Capture.layers`.
    mixers: Mixer outputs of the layers in `Capture.mixers`.
    qkv: Queries, keys and values of the layers in `Capture.qkv`.
    balance: Load imbalance over experts of each row, averaged over the MoE layers; 1, its minimum, if tokens spread
      evenly. None without MoE layers and in decoding.
  """

  hidden: Float[Array, "B T D"]
  readout: Readout
  layers: Mapping[int, Float[Array, "B T D"]] = dataclasses.field(default_factory=dict)
  mixers: Mapping[int, Float[Array, "B T D"]] = dataclasses.field(default_factory=dict)
  qkv: Mapping[int, Qkv] = dataclasses.field(default_factory=dict)
  balance: Float[Array, " B"] | None = None


@_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseTarget:
  """A teacher's next-token distribution: the probabilities of some tokens, and one for all other tokens together.

  Attributes:
    ids: Tokens of the support, each at most once a position; -1 marks an unused entry.
    log_probs: Log-probabilities of `ids` at the temperature of the target; log(count / draws) if the tokens were drawn.
    tail: Log-probability of all other tokens together; -inf or below -10⁴ if they have no probability.
  """

  ids: Int[Array, "*B k"]
  log_probs: Float[Array, "*B k"]
  tail: Float[Array, "*B"]


@_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseSignal:
  """A teacher's next-token distributions over the whole vocabulary, as hidden states and the readout to logits.

  Captured activations are in `layers`, `mixers` and `qkv`, keyed by layer index.
  """

  hidden: Float[Array, "B T D"]
  readout: Readout
  layers: Mapping[int, Float[Array, "B T D"]] = dataclasses.field(default_factory=dict)
  mixers: Mapping[int, Float[Array, "B T D"]] = dataclasses.field(default_factory=dict)
  qkv: Mapping[int, Qkv] = dataclasses.field(default_factory=dict)

  def target_rows(self) -> tuple[Float[Array, "M D"], Readout]:
    """Returns the teacher's hidden states [M,D] of all M tokens of the batch, and the map from them to logits."""
    return _rows(self.hidden), self.readout


@_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseSignal:
  """A teacher's next-token distributions as sparse targets, and its captured activations by layer number."""

  target: SparseTarget
  layers: Mapping[int, Float[Array, "B T D"]] = dataclasses.field(default_factory=dict)
  mixers: Mapping[int, Float[Array, "B T D"]] = dataclasses.field(default_factory=dict)
  qkv: Mapping[int, Qkv] = dataclasses.field(default_factory=dict)

  def target_rows(self) -> tuple[SparseTarget, None]:
    """Returns the teacher's sparse targets of all M tokens of the batch, and None.

    None is in the place of the readout that `DenseSignal.target_rows` returns. Sparse targets need no readout, because
    they already hold log-probabilities.
    """
    return jax.tree.map(_rows, self.target), None


TeacherSignal = DenseSignal | SparseSignal


def _rows(x: Array) -> Array:
  """Flattens [B, T, …] to [M, …], where M = B·T."""
  return x.reshape(-1, *x.shape[2:])


@_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
  """Packed rows of tokens, cut into documents.

  Attributes:
    tokens: Token ids.
    segments: Number of the document that each token belongs to within its row, from 1; 0 marks padding.
    positions: Position within the document, from 0.
    loss_mask: Weight of PREDICTING `tokens[:, t + 1]` from position t, 0 or 1: the last position of a document
      and padding have 0.
    routes: Index of the adapter set that the teacher uses for each row; None means 0 for all rows.
    signal: The teacher's signal for these rows, if it was read from a teacher cache; else None.
  """

  tokens: Int[Array, "B T"]
  segments: Int[Array, "B T"]
  positions: Int[Array, "B T"]
  loss_mask: Float[Array, "B T"]
  routes: Int[Array, " B"] | None = None
  signal: SparseSignal | None = None
