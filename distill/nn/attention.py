"""Causal softmax attention with grouped key/value heads."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from distill.kernels.attention import attention
from distill.nn.linear import Linear
from distill.nn.mixer import HeadShape
from distill.nn.norm import RMSNorm
from distill.nn.param import Init, zeros
from distill.nn.rope import RopeConfig, document_lengths, frequencies, rotate


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
  """Causal softmax attention with grouped key/value heads.

  Attributes:
    rope: None for a layer that sees positions through its mask alone.
    window: A position attends to itself and the window − 1 before it; None for all before it.
    scale: Multiplies query-key products; None for head_dim ** −0.5.
    softcap: cap * tanh(score / cap), if any.
    sinks: A learnt score a head that takes part in the softmax and adds nothing (gpt-oss).
    gated: The output is multiplied by sigmoid of a second projection (Qwen 3.5).
    qk_norm: Queries and keys are RMS-normalised: 'head' for each head, 'full' across all of them, or None.
    use_bias: Biases on q, k, v.
    use_out_bias: Bias on the output projection.
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

  @property
  def head_shape(self) -> HeadShape:
    """Its query heads and key/value heads, all of one width."""
    return HeadShape(
      heads=self.num_heads, key_heads=self.num_kv_heads, key_width=self.head_dim, value_width=self.head_dim
    )

  @property
  def qkv_widths(self) -> tuple[int, int, int]:
    """Widths of all queries, all keys and all values."""
    keys = self.num_kv_heads * self.head_dim
    return self.num_heads * self.head_dim, keys, keys

  @property
  def bound_to_length(self) -> bool:
    """Rotary frequencies depend on the length of a document."""
    return self.rope is not None and self.rope.by_length

  def build(self, init: Init, *, width: int, norm_eps: float, norm_offset: float) -> "Attention":
    """Makes the module; `norm_eps` and `norm_offset` are of the norms of queries and keys."""
    return Attention(init, spec=self, width=width, norm_eps=norm_eps, norm_offset=norm_offset)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCache:
  """Keys and values of the latest S positions: slot s holds the last position seen that is s modulo S.

  Rows and heads are one dimension B * K: XLA's CPU products drop a batch of one, and would copy the cache to do so.

  Attributes:
    length: Positions of the longest text there is room for; S is less where a window bounds it.
  """

  k: Float[Array, "BK S H"]
  v: Float[Array, "BK S H"]
  length: int = dataclasses.field(metadata={"static": True})


def held(positions: Int[Array, " B"], *, size: int) -> Int[Array, "B S"]:
  """Position in each slot of a ring of `size` whose latest position is given; below 0 where there is none yet."""
  return positions[:, None] - (positions[:, None] - jnp.arange(size)) % size


class Attention(nnx.Module):
  """Softmax attention within each document of a packed row (Vaswani et al. 2017; Ainslie et al. 2023, 2305.13245).

  Args:
    init: Maker of the parameters.
    spec: What it computes.
    width: Model width D.
    norm_eps: Of the norms of queries and keys.
    norm_offset: Of the same.
  """

  def __init__(self, init: Init, *, spec: AttentionConfig, width: int, norm_eps: float, norm_offset: float):
    self.spec = spec
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim

    def project(name: str, out: int, axis: str) -> Linear:
      return Linear(init.child(name), shape=(width, out), axes=("embed", axis), use_bias=spec.use_bias)

    def norm(name: str, full: int) -> RMSNorm | None:
      size = full if spec.qk_norm == "full" else spec.head_dim
      return RMSNorm(init.child(name), width=size, eps=norm_eps, offset=norm_offset) if spec.qk_norm else None

    self.q = project("q", queries * (2 if spec.gated else 1), "heads")
    self.k = project("k", keys, "kv_heads")
    self.v = project("v", keys, "kv_heads")
    self.o = Linear(init.child("o"), shape=(queries, width), axes=("heads", "embed"), use_bias=spec.use_out_bias)
    self.q_norm, self.k_norm = norm("q_norm", queries), norm("k_norm", keys)
    self.sinks = init.param("sinks", shape=(spec.num_heads,), axes=("heads",), init=zeros) if spec.sinks else None

  def _project(self, x, positions, inverse):
    """(q [*B,K,G,H], k [*B,K,H], v [*B,K,H], gate [*B,N,H] or None), rotated, in x's dtype."""
    spec = self.spec
    q, k, gate = self.q(x, out=jnp.float32), self.k(x, out=jnp.float32), None
    v = self.v(x).reshape(*x.shape[:-1], spec.num_kv_heads, spec.head_dim)
    if spec.qk_norm == "full":
      q, k = self.q_norm(q), self.k_norm(k)
    q, k = q.reshape(*x.shape[:-1], spec.num_heads, -1), k.reshape(v.shape)
    if spec.gated:
      q, gate = q[..., : spec.head_dim], q[..., spec.head_dim :]
    if spec.qk_norm == "head":
      q, k = self.q_norm(q), self.k_norm(k)
    if spec.rope is not None:
      factor = spec.rope.attention_factor
      q, k = (rotate(y, positions=positions, inverse=inverse, factor=factor) for y in (q, k))
    q = q.reshape(*q.shape[:-2], spec.num_kv_heads, -1, spec.head_dim)
    return q.astype(x.dtype), k.astype(x.dtype), v, gate

  def _inverse(self, segments, positions):
    """Frequencies for whole rows: one set, or [B,T,Half] where they depend on a document's length."""
    if self.spec.rope is None:
      return None
    inverse, first = frequencies(self.spec.head_dim, rope=self.spec.rope, length=segments.shape[1])
    if len(inverse) == 1:
      return inverse[0]
    row = jnp.clip(document_lengths(segments, positions=positions) - first, 0, len(inverse) - 1)
    return jnp.asarray(inverse)[row]

  @property
  def _scale(self) -> float:
    return self.spec.head_dim**-0.5 if self.spec.scale is None else self.spec.scale

  def _weights(self, scores, mask, dtype):
    """Softmax of float32 scores [B,K,G,…,S] where the mask lets them through."""
    scores = scores * self._scale
    if self.spec.softcap is not None:
      scores = self.spec.softcap * jnp.tanh(scores / self.spec.softcap)
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    if self.sinks is None:
      return jax.nn.softmax(scores, axis=-1).astype(dtype)
    sinks = self.sinks[...].astype(jnp.float32).reshape(self.spec.num_kv_heads, -1, *[1] * (scores.ndim - 3))
    most = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks))
    raised = jnp.exp(scores - most)
    return (raised / (jnp.sum(raised, axis=-1, keepdims=True) + jnp.exp(sinks - most))).astype(dtype)

  def _output(self, y_BTNH, gate, dtype):
    if gate is not None:
      y_BTNH = y_BTNH * jax.nn.sigmoid(gate.astype(jnp.float32))
    return self.o(y_BTNH.astype(dtype).reshape(*y_BTNH.shape[:-2], -1), out=jnp.float32)

  def _mix(self, x, *, segments, positions, inverse, dtype):
    """(mixed sequence [B,T,D], keys [B,K,T,H], values [B,K,T,H])."""
    spec = self.spec
    q_BTKGH, k_BSKH, v_BSKH, gate = self._project(x.astype(dtype), positions, inverse)
    q_BKGTH = q_BTKGH.transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    sinks = None if self.sinks is None else self.sinks[...].reshape(spec.num_kv_heads, -1)
    y = attention(
      q_BKGTH,
      k_BKSH,
      v_BKSH,
      segments=segments,
      scale=self._scale,
      softcap=spec.softcap,
      window=spec.window,
      sinks=sinks,
    )
    y = self._output(y.transpose(0, 3, 1, 2, 4).reshape(*x.shape[:2], spec.num_heads, -1), gate, dtype)
    return y, k_BKSH, v_BKSH

  def __call__(
    self, x: Float[Array, "B T D"], *, segments: Int[Array, "B T"], positions: Int[Array, "B T"], dtype: DTypeLike
  ) -> Float[Array, "B T D"]:
    """Mixed sequence, float32; operands are `dtype`, scores and softmax float32."""
    inverse = self._inverse(segments, positions)
    return self._mix(x, segments=segments, positions=positions, inverse=inverse, dtype=dtype)[0]

  def qkv(self, x: Float[Array, "B T D"], *, dtype: DTypeLike) -> tuple[Float[Array, "B T I"], ...]:
    """Queries, keys and values of all heads side by side, float32, as projected: neither normalised nor rotated."""
    x = x.astype(dtype)
    q, k, v = (project(x, out=jnp.float32) for project in (self.q, self.k, self.v))
    if self.spec.gated:
      q = q.reshape(*q.shape[:-1], self.spec.num_heads, -1)[..., : self.spec.head_dim].reshape(*q.shape[:-1], -1)
    return q, k, v

  def _slots(self, length: int) -> int:
    return length if self.spec.window is None else min(length, self.spec.window)

  def _full(self, length: int):
    """Frequencies of a document of `length` positions."""
    rope = self.spec.rope
    return None if rope is None else frequencies(self.spec.head_dim, rope=rope, length=length)[0][-1]

  def init_cache(self, batch: int, *, length: int, dtype: DTypeLike) -> AttentionCache:
    """An empty cache for texts of `length` positions."""
    shape = (batch * self.spec.num_kv_heads, self._slots(length), self.spec.head_dim)
    return AttentionCache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype), length=length)

  def prefill(
    self, x: Float[Array, "B T D"], *, lengths: Int[Array, " B"], length: int, dtype: DTypeLike
  ) -> tuple[Float[Array, "B T D"], AttentionCache]:
    """Rows of `lengths` positions at once, and the cache as `lengths` steps would leave it.

    Outputs past a row's length mean nothing. Frequencies that depend on a document's length are those of a document of
    `length` positions, as in `step`.
    """
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    y, k, v = self._mix(x, segments=segments, positions=positions, inverse=self._full(length), dtype=dtype)
    held_BS = held(lengths - 1, size=self._slots(length))

    def place(x_BKTH):
      taken = jnp.take_along_axis(x_BKTH, jnp.clip(held_BS, 0, x.shape[1] - 1)[:, None, :, None], axis=2)
      placed = jnp.where((held_BS >= 0)[:, None, :, None], taken, 0)
      return placed.reshape(-1, *placed.shape[2:])

    return y, AttentionCache(k=place(k), v=place(v), length=length)

  def step(
    self, x: Float[Array, "B D"], *, cache: AttentionCache, positions: Int[Array, " B"], dtype: DTypeLike
  ) -> tuple[Float[Array, "B D"], AttentionCache]:
    """One position a row, float32, which attends to all positions before it in its window, and itself.

    Frequencies that depend on a document's length are those of a document that fills the cache.
    """
    spec, size, heads = self.spec, cache.k.shape[1], self.spec.num_kv_heads
    q_BKGH, k_BKH, v_BKH, gate = self._project(x.astype(dtype), positions, self._full(cache.length))
    rows, slots = jnp.arange(len(cache.k)), jnp.repeat(positions % size, heads)

    def put(cache, new):
      new = new.reshape(-1, spec.head_dim).astype(cache.dtype)
      return cache.at[rows, slots].set(new, mode="promise_in_bounds", unique_indices=True)

    keys, values = put(cache.k, k_BKH), put(cache.v, v_BKH)
    q = q_BKGH.reshape(len(rows), -1, spec.head_dim)
    scores = jnp.einsum("rgh,rsh->rgs", q, keys.astype(dtype), preferred_element_type=jnp.float32)
    # No slot is further back than the window: there are no more slots than that.
    seen_BS = held(positions, size=size) >= 0
    scores = scores.reshape(len(x), heads, -1, size)
    weights = self._weights(scores, seen_BS[:, None, None], dtype).reshape(len(rows), -1, size)
    y = jnp.einsum("rgs,rsh->rgh", weights, values.astype(dtype), preferred_element_type=jnp.float32)
    y = self._output(y.reshape(len(x), spec.num_heads, spec.head_dim), gate, dtype)
    return y, dataclasses.replace(cache, k=keys, v=values)
