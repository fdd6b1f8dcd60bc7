"""Causal softmax attention with grouped key/value heads."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from distill.errors import InputError
from distill.kernels.attention import attention
from distill.nn.linear import Linear
from distill.nn.mixer import HeadShape
from distill.nn.norm import RMSNorm
from distill.nn.param import Init, zeros
from distill.nn.rope import RopeConfig, document_lengths, frequencies, rotate


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
  """Configuration of causal softmax attention with grouped key/value heads.

  Attributes:
    num_heads: Number of query heads N.
    num_kv_heads: Number of key/value heads K, a divisor of `num_heads`.
    head_dim: Head width H.
    rope: Rotary position embedding; None for no position embedding (NoPE).
    window: A position attends to itself and the window − 1 positions before it; None for all positions before it.
    scale: Multiplies query-key products; None for head_dim ** −0.5.
    softcap: Scores become softcap * tanh(score / softcap); None for no cap.
    sinks: Adds one trainable logit per head to the softmax; it takes a part of the weight, but has no value (gpt-oss).
    gated: Multiplies the output by the sigmoid of a second projection (Qwen 3.5).
    qk_norm: RMS norm of queries and keys: 'head' for each head alone, 'full' across all heads (not if gated), or None.
    use_bias: Adds biases to the projections q, k and v.
    use_out_bias: Adds a bias to the output projection.

  Raises:
    InputError: The attention is gated and `qk_norm` is 'full'.
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope: RopeConfig | None
  window: int | None = None
  scale: float | None = None
  softcap: float | None = None
  sinks: bool = False
  gated: bool = False
  qk_norm: str | None = None
  use_bias: bool = False
  use_out_bias: bool = False

  kind: ClassVar[str] = "attention"
  exact_dtype: ClassVar[bool] = False

  def __post_init__(self):
    # The projection q holds queries and gates head by head: a norm across all of it would normalise the gates too.
    if self.gated and self.qk_norm == "full":
      raise InputError(
        "AttentionConfig: qk_norm='full' cannot be combined with gated=True; set qk_norm to 'head' or None, or set "
        "gated=False"
      )

  @property
  def head_shape(self) -> HeadShape:
    """Numbers of query heads and of key/value heads, and their width."""
    return HeadShape(
      heads=self.num_heads, key_heads=self.num_kv_heads, key_width=self.head_dim, value_width=self.head_dim
    )

  @property
  def qkv_widths(self) -> tuple[int, int, int]:
    """Widths of the queries, keys and values of all heads."""
    keys = self.num_kv_heads * self.head_dim
    return self.num_heads * self.head_dim, keys, keys

  @property
  def bound_to_length(self) -> bool:
    """True if the rotary frequencies depend on the length of the document."""
    return self.rope is not None and self.rope.by_length

  def mixing_flops(self, length: int) -> float:
    """Returns the FLOPs of scores and weighted values of one position, which sees half of the row or its window."""
    seen = length / 2 if self.window is None else min(self.window, length / 2)
    return 4 * seen * self.num_heads * self.head_dim

  def build(self, init: Init, *, width: int, norm_eps: float, norm_offset: float) -> "Attention":
    """Makes the module; `norm_eps` and `norm_offset` apply to the norms of queries and keys."""
    return Attention(init, config=self, width=width, norm_eps=norm_eps, norm_offset=norm_offset)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KvCache:
  """The KV cache of one attention layer: a ring buffer of the keys and values of the latest S positions.

  Slot s holds the latest position p with p % S = s. Rows and heads share one dimension B·K: with a separate dimension
  for a batch of one, the CPU code of XLA would remove it before each matmul and copy the whole buffer to do so.

  Attributes:
    k: Keys.
    v: Values.
    length: Number of positions that a row may grow to. S is this number, or the attention window if that is smaller.
  """

  k: Float[Array, "BK S H"]
  v: Float[Array, "BK S H"]
  length: int = dataclasses.field(metadata={"static": True})


def ring_positions(latest: Int[Array, " B"], *, size: int) -> Int[Array, "B S"]:
  """Returns the position that each of the `size` slots of a ring buffer holds, negative for an empty slot.

  Args:
    latest: The last position that was written in each row; −1 if there is none.
    size: Number of slots S.
  """
  return latest[:, None] - (latest[:, None] - jnp.arange(size)[None, :]) % size


class Attention(nnx.Module):
  """Softmax attention within each document of a packed row (Vaswani et al. 2017; Ainslie et al. 2023, 2305.13245).

  Args:
    init: Creates the parameters of the module.
    config: Architecture.
    width: Model width D.
    norm_eps: Epsilon of the norms of queries and keys.
    norm_offset: Added to the stored scales of these norms: 1.0 if stored as differences from one, else 0.0.
  """

  def __init__(self, init: Init, *, config: AttentionConfig, width: int, norm_eps: float, norm_offset: float):
    self.config = config
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def project(name: str, out: int, axis: str) -> Linear:
      return Linear(init.child(name), shape=(width, out), axes=("embed", axis), use_bias=config.use_bias)

    def norm(name: str, full: int) -> RMSNorm | None:
      size = full if config.qk_norm == "full" else config.head_dim
      return RMSNorm(init.child(name), width=size, eps=norm_eps, offset=norm_offset) if config.qk_norm else None

    self.q = project("q", queries * (2 if config.gated else 1), "heads")
    self.k = project("k", keys, "kv_heads")
    self.v = project("v", keys, "kv_heads")
    self.o = Linear(init.child("o"), shape=(queries, width), axes=("heads", "embed"), use_bias=config.use_out_bias)
    self.q_norm, self.k_norm = norm("q_norm", queries), norm("k_norm", keys)
    self.sinks = init.param("sinks", shape=(config.num_heads,), axes=("heads",), init=zeros) if config.sinks else None

  def _project(self, x, positions, inverse):
    """Returns (q [*B,K,G,H], k [*B,K,H], v [*B,K,H], gate [*B,N,H]), where N = K * G; the gate is None if not `gated`.

    q and k are normalised if the configuration has `qk_norm`. With RoPE they are rotated by the rotary frequencies
    `inverse`, which are None without RoPE. q, k and v have x's dtype; the gate is float32.
    """
    config = self.config
    q, k, gate = self.q(x, out=jnp.float32), self.k(x, out=jnp.float32), None
    v = self.v(x).reshape(*x.shape[:-1], config.num_kv_heads, config.head_dim)
    if config.qk_norm == "full":
      q, k = self.q_norm(q), self.k_norm(k)
    q, k = q.reshape(*x.shape[:-1], config.num_heads, -1), k.reshape(v.shape)
    if config.gated:
      q, gate = q[..., : config.head_dim], q[..., config.head_dim :]
    if config.qk_norm == "head":
      q, k = self.q_norm(q), self.k_norm(k)
    if config.rope is not None:
      factor = config.rope.attention_factor
      q, k = (rotate(y, positions=positions, inverse=inverse, factor=factor) for y in (q, k))
    q = q.reshape(*q.shape[:-2], config.num_kv_heads, -1, config.head_dim)
    return q.astype(x.dtype), k.astype(x.dtype), v, gate

  def _inverse(self, segments, positions):
    """Returns the rotary frequencies of packed rows; None without RoPE.

    They are [Half], the same for all tokens, unless they depend on a document's length: then [B,T,Half].
    """
    if self.config.rope is None:
      return None
    inverse, first = frequencies(self.config.head_dim, rope=self.config.rope, length=segments.shape[1])
    if len(inverse) == 1:
      return inverse[0]
    row = jnp.clip(document_lengths(segments, positions=positions) - first, 0, len(inverse) - 1)
    return jnp.asarray(inverse)[row]

  @property
  def _scale(self) -> float:
    return self.config.head_dim**-0.5 if self.config.scale is None else self.config.scale

  def _weights(self, scores, mask, dtype):
    """Returns the attention weights: scales, caps and masks `scores`, then applies the softmax.

    Args:
      scores: Query-key products [B,K,G,…,S], float32.
      mask: True where a query sees a key; broadcast to `scores`.
      dtype: Dtype of the weights.
    """
    scores = scores * self._scale
    if self.config.softcap is not None:
      scores = self.config.softcap * jnp.tanh(scores / self.config.softcap)
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    if self.sinks is None:
      return jax.nn.softmax(scores, axis=-1).astype(dtype)
    sinks = self.sinks[...].astype(jnp.float32).reshape(1, self.config.num_kv_heads, -1, *[1] * (scores.ndim - 3))
    max_logit = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks))
    exp_scores = jnp.exp(scores - max_logit)
    return (exp_scores / (jnp.sum(exp_scores, axis=-1, keepdims=True) + jnp.exp(sinks - max_logit))).astype(dtype)

  def _output(self, y_BTNH, gate, dtype):
    if gate is not None:
      y_BTNH = y_BTNH * jax.nn.sigmoid(gate.astype(jnp.float32))
    return self.o(y_BTNH.astype(dtype).reshape(*y_BTNH.shape[:-2], -1), out=jnp.float32)

  def _mix(self, x, *, segments, positions, inverse, dtype):
    """Returns (output [B,T,D], keys [B,K,T,H], values [B,K,T,H]) of a training or prefill batch."""
    config = self.config
    q_BTKGH, k_BSKH, v_BSKH, gate = self._project(x.astype(dtype), positions, inverse)
    q_BKGTH = q_BTKGH.transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    sinks = None if self.sinks is None else self.sinks[...].reshape(config.num_kv_heads, -1)
    y = attention(
      q_BKGTH,
      k_BKSH,
      v_BKSH,
      segments=segments,
      scale=self._scale,
      softcap=config.softcap,
      window=config.window,
      sinks=sinks,
    )
    y = self._output(y.transpose(0, 3, 1, 2, 4).reshape(*x.shape[:2], config.num_heads, -1), gate, dtype)
    return y, k_BKSH, v_BKSH

  def __call__(
    self, x: Float[Array, "B T D"], *, segments: Int[Array, "B T"], positions: Int[Array, "B T"], dtype: DTypeLike
  ) -> Float[Array, "B T D"]:
    """Attends within each document of packed rows.

    Operands of matmuls are `dtype`; scores, softmax and the result are float32.
    """
    inverse = self._inverse(segments, positions)
    return self._mix(x, segments=segments, positions=positions, inverse=inverse, dtype=dtype)[0]

  def qkv(self, x: Float[Array, "B T D"], *, dtype: DTypeLike) -> tuple[Float[Array, "B T I"], ...]:
    """Returns queries, keys and values, each concatenated over heads, float32, neither normalised nor rotated."""
    x = x.astype(dtype)
    q, k, v = (project(x, out=jnp.float32) for project in (self.q, self.k, self.v))
    if self.config.gated:
      q = q.reshape(*q.shape[:-1], self.config.num_heads, -1)[..., : self.config.head_dim].reshape(*q.shape[:-1], -1)
    return q, k, v

  def _slots(self, length: int) -> int:
    return length if self.config.window is None else min(length, self.config.window)

  def _decoding_inverse(self, length: int):
    """Returns the frequency of each rotated channel pair, for documents of `length` positions; None without RoPE."""
    rope = self.config.rope
    return None if rope is None else frequencies(self.config.head_dim, rope=rope, length=length)[0][-1]

  def init_state(self, batch: int, *, length: int, dtype: DTypeLike) -> KvCache:
    """Returns an empty KV cache for `batch` rows that may grow to `length` positions."""
    shape = (batch * self.config.num_kv_heads, self._slots(length), self.config.head_dim)
    return KvCache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype), length=length)

  def prefill(
    self, x: Float[Array, "B T D"], *, lengths: Int[Array, " B"], length: int, dtype: DTypeLike
  ) -> tuple[Float[Array, "B T D"], KvCache]:
    """Mixes prompts, of which row b has `lengths[b]` positions and then padding; returns (outputs, KV cache).

    The KV cache of row b is the one that `lengths[b]` calls of `step` would leave. Outputs at padding are undefined.
    `length` is the number of positions that each row may grow to. It sets the size of the KV cache and, if rotary
    frequencies depend on the document's length, these frequencies.
    """
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    y, k, v = self._mix(x, segments=segments, positions=positions, inverse=self._decoding_inverse(length), dtype=dtype)
    slots_BS = ring_positions(lengths - 1, size=self._slots(length))

    def to_ring(x_BKTH):
      taken = jnp.take_along_axis(x_BKTH, jnp.clip(slots_BS, 0, x.shape[1] - 1)[:, None, :, None], axis=2)
      ring = jnp.where((slots_BS >= 0)[:, None, :, None], taken, 0)
      return ring.reshape(-1, *ring.shape[2:])

    return y, KvCache(k=to_ring(k), v=to_ring(v), length=length)

  def step(
    self, x: Float[Array, "B D"], *, state: KvCache, positions: Int[Array, " B"], dtype: DTypeLike
  ) -> tuple[Float[Array, "B D"], KvCache]:
    """Mixes the next position of each row, which attends to itself and the positions before it in its window.

    Returns (output, new KV cache). If rotary frequencies depend on the document's length, that length is taken to be
    `state.length`, the number of positions that a row may grow to.
    """
    config, size, heads = self.config, state.k.shape[1], self.config.num_kv_heads
    q_BKGH, k_BKH, v_BKH, gate = self._project(x.astype(dtype), positions, self._decoding_inverse(state.length))
    rows, slots = jnp.arange(len(state.k)), jnp.repeat(positions % size, heads)

    def write(ring, new):
      new = new.reshape(-1, config.head_dim).astype(ring.dtype)
      return ring.at[rows, slots].set(new, mode="promise_in_bounds", unique_indices=True)

    keys, values = write(state.k, k_BKH), write(state.v, v_BKH)
    q = q_BKGH.reshape(len(rows), -1, config.head_dim)
    scores = jnp.einsum("rgh,rsh->rgs", q, keys.astype(dtype), preferred_element_type=jnp.float32)
    # The window needs no mask: the ring has at most as many slots as the window.
    seen_BS = ring_positions(positions, size=size) >= 0
    scores = scores.reshape(len(x), heads, -1, size)
    weights = self._weights(scores, seen_BS[:, None, None], dtype).reshape(len(rows), -1, size)
    y = jnp.einsum("rgs,rsh->rgh", weights, values.astype(dtype), preferred_element_type=jnp.float32)
    y = self._output(y.reshape(len(x), config.num_heads, config.head_dim), gate, dtype)
    return y, dataclasses.replace(state, k=keys, v=values)
