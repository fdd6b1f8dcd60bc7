"""Causal softmax attention with grouped key/value heads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from distill.nn.linear import Linear
from distill.nn.norm import RMSNorm
from distill.nn.param import Init
from distill.nn.rope import rotate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCache:
  """Keys and values of the positions seen so far; slot s holds position s."""

  k: Float[Array, "B S K H"]
  v: Float[Array, "B S K H"]


class AttentionMixer(nnx.Module):
  """Softmax attention within each document of a packed row (Vaswani et al. 2017; Ainslie et al. 2023, 2305.13245).

  Args:
    init: Maker of the parameters.
    width: Model width D.
    num_heads: Query heads N.
    num_kv_heads: Key/value heads K, a divisor of N.
    head_dim: Head width H.
    inverse: Rotary frequencies, from `rope.frequencies`.
    norm: (eps, offset) of the per-head norms of queries and keys, or None for none.
    gated: The output is multiplied by the sigmoid of a gate projected with the query.
    use_bias: (on q, k and v; on the output).
  """

  def __init__(
    self,
    init: Init,
    *,
    width: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    inverse: np.ndarray,
    norm: tuple[float, float] | None = None,
    gated: bool = False,
    use_bias: tuple[bool, bool] = (False, False),
  ):
    self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
    self.gated = gated
    self.inverse = tuple(map(float, inverse))
    queries, keys = num_heads * head_dim, num_kv_heads * head_dim

    def project(name: str, out: int, axis: str) -> Linear:
      return Linear(init.child(name), shape=(width, out), axes=("embed", axis), use_bias=use_bias[0])

    self.q = project("q", queries * (2 if gated else 1), "heads")
    self.k = project("k", keys, "kv_heads")
    self.v = project("v", keys, "kv_heads")
    self.o = Linear(init.child("o"), shape=(queries, width), axes=("heads", "embed"), use_bias=use_bias[1])
    if norm is None:
      self.q_norm = self.k_norm = None
    else:
      self.q_norm = RMSNorm(init.child("q_norm"), width=head_dim, eps=norm[0], offset=norm[1])
      self.k_norm = RMSNorm(init.child("k_norm"), width=head_dim, eps=norm[0], offset=norm[1])

  def _project(self, x, positions):
    """(q [*B,K,G,H], k [*B,K,H], v [*B,K,H], gate [*B,N,H] or None), rotated, in x's dtype."""
    heads = (*x.shape[:-1], self.num_heads, -1)
    q, gate = self.q(x).reshape(heads), None
    if self.gated:
      q, gate = q[..., : self.head_dim], q[..., self.head_dim :]
    k, v = (f(x).reshape(*x.shape[:-1], self.num_kv_heads, self.head_dim) for f in (self.k, self.v))
    if self.q_norm is not None:
      q, k = self.q_norm(q), self.k_norm(k)
    inverse = np.asarray(self.inverse, np.float32)
    q, k = (rotate(y, positions=positions, inverse=inverse) for y in (q, k))
    return q.reshape(*q.shape[:-2], self.num_kv_heads, -1, self.head_dim), k, v, gate

  def _output(self, y_BTNH, gate, dtype):
    if gate is not None:
      y_BTNH = y_BTNH * jax.nn.sigmoid(gate.astype(jnp.float32))
    return self.o(y_BTNH.astype(dtype).reshape(*y_BTNH.shape[:-2], -1))

  def __call__(
    self, x: Float[Array, "B T D"], *, segments: Int[Array, "B T"], positions: Int[Array, "B T"]
  ) -> Float[Array, "B T D"]:
    """Mixed sequence, in x's dtype; scores and softmax are float32."""
    q_BTKGH, k_BSKH, v_BSKH, gate = self._project(x, positions)
    length = x.shape[1]
    q_BKGTH = q_BTKGH.transpose(0, 2, 3, 1, 4) * self.head_dim**-0.5
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    causal_TS = jnp.tril(jnp.ones((length, length), bool))
    mask_BTS = causal_TS & (segments[:, :, None] == segments[:, None, :])
    scores = jnp.einsum("bkgth,bksh->bkgts", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
    y = jnp.einsum("bkgts,bksh->bkgth", weights, v_BKSH, preferred_element_type=jnp.float32)
    return self._output(y.transpose(0, 3, 1, 2, 4).reshape(*x.shape[:2], self.num_heads, -1), gate, x.dtype)

  def init_cache(self, batch: int, *, length: int, dtype: DTypeLike) -> AttentionCache:
    """An empty cache for `length` positions."""
    empty = jnp.zeros((batch, length, self.num_kv_heads, self.head_dim), dtype)
    return AttentionCache(k=empty, v=empty)

  def step(
    self, x: Float[Array, "B D"], *, cache: AttentionCache, positions: Int[Array, " B"]
  ) -> tuple[Float[Array, "B D"], AttentionCache]:
    """One position a row, which attends to all positions before it and itself."""
    q_BKGH, k_BKH, v_BKH, gate = self._project(x, positions)
    rows = jnp.arange(x.shape[0])
    keys = cache.k.at[rows, positions].set(k_BKH.astype(cache.k.dtype))
    values = cache.v.at[rows, positions].set(v_BKH.astype(cache.v.dtype))
    scores = jnp.einsum("bkgh,bskh->bkgs", q_BKGH, keys.astype(x.dtype), preferred_element_type=jnp.float32)
    seen_BS = jnp.arange(keys.shape[1]) <= positions[:, None]
    scores = jnp.where(seen_BS[:, None, None], scores * self.head_dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
    y = jnp.einsum("bkgs,bskh->bkgh", weights, values.astype(x.dtype), preferred_element_type=jnp.float32)
    y = self._output(y.reshape(x.shape[0], self.num_heads, self.head_dim), gate, x.dtype)
    return y, AttentionCache(k=keys, v=values)
