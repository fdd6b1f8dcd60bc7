"""Softmax attention of whole rows, a block of queries at a time."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Queries a block: few enough that a block's scores stay near, many enough for its products; and never more blocks
# than these, for each is compiled by itself.
_QUERIES, _BLOCKS = 128, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
  """How products of queries and keys become scores.

  Attributes:
    scale: Multiplies them.
    softcap: cap * tanh(score / cap), if any.
    window: A position sees itself and the window − 1 before it; None for all before it.
  """

  scale: float
  softcap: float | None = None
  window: int | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
  scoring: Scoring,
  q: Float[Array, "B K G T H"],
  k: Float[Array, "B K T H"],
  v: Float[Array, "B K T H"],
  segments: Int[Array, "B T"],
  sinks: Float[Array, "K G"] | None,
) -> Float[Array, "B K G T H"]:
  """Causal attention within each segment, float32; operands stay in q's dtype, scores and softmax are float32.

  Blocks see the keys before their end alone, so that of long rows nearly half of the products are never made, and
  nothing of [T, T] is kept: the backward pass computes a block's weights again (Dao et al. 2022, 2205.14135).

  Args:
    scoring: How scores are made.
    q: Queries, G of them for each key.
    k: Keys.
    v: Values.
    segments: Runs of neighbours that see each other.
    sinks: A score that takes part in the softmax and adds nothing.
  """
  out = []
  for block in _blocks(q.shape[3], scoring.window):
    weights = _weights(scoring, block, q[:, :, :, block.queries], k, segments, sinks)[0]
    out.append(_values(weights.astype(q.dtype), v[:, :, block.keys]))
  return jnp.concatenate(out, axis=3)


@dataclasses.dataclass(frozen=True)
class _Block:
  """Queries start .. stop − 1, and what they may see: keys first .. stop − 1."""

  start: int
  stop: int
  first: int

  @property
  def queries(self) -> slice:
    return slice(self.start, self.stop)

  @property
  def keys(self) -> slice:
    return slice(self.first, self.stop)


def _blocks(length: int, window: int | None) -> Iterator[_Block]:
  size = max(_QUERIES, -(-length // _BLOCKS))
  for start in range(0, length, size):
    yield _Block(start, min(start + size, length), 0 if window is None else max(0, start - window + 1))


def _values(weights, v):
  return jnp.einsum("bkgts,bksh->bkgth", weights, v, preferred_element_type=jnp.float32)


def _weights(scoring, block, q, k, segments, sinks):
  """(weights [B,K,G,C,S], those of the sinks [B,K,G,C,1] or None, slope of the softcap or None)."""
  scores = jnp.einsum("bkgth,bksh->bkgts", q, k[:, :, block.keys], preferred_element_type=jnp.float32) * scoring.scale
  slope = None
  if scoring.softcap is not None:
    bent = jnp.tanh(scores / scoring.softcap)
    scores, slope = scoring.softcap * bent, 1.0 - jnp.square(bent)
  # Segments are runs of neighbours, so distances within one are distances within the row.
  back = jnp.arange(block.start, block.stop)[:, None] - jnp.arange(block.first, block.stop)
  near = (back >= 0) if scoring.window is None else (back >= 0) & (back < scoring.window)
  mask = near & (segments[:, block.queries, None] == segments[:, None, block.keys])
  scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
  most = jnp.max(scores, axis=-1, keepdims=True)
  if sinks is None:
    raised = jnp.exp(scores - most)
    return raised / jnp.sum(raised, axis=-1, keepdims=True), None, slope
  sinks = sinks.astype(jnp.float32)[:, :, None, None]
  most = jnp.maximum(most, sinks)
  raised, sunk = jnp.exp(scores - most), jnp.exp(sinks - most)
  total = jnp.sum(raised, axis=-1, keepdims=True) + sunk
  return raised / total, sunk / total, slope


def _forward(scoring, q, k, v, segments, sinks):
  return attend(scoring, q, k, v, segments, sinks), (q, k, v, segments, sinks)


def _backward(scoring, saved, cotangent):
  q, k, v, segments, sinks = saved
  cotangent = cotangent.astype(q.dtype)
  of_k, of_v = (jnp.zeros(x.shape, jnp.float32) for x in (k, v))
  of_q = []
  of_sinks = None if sinks is None else jnp.zeros(sinks.shape, jnp.float32)

  def product(formula, *operands):
    return jnp.einsum(formula, *operands, preferred_element_type=jnp.float32)

  for block in _blocks(q.shape[3], scoring.window):
    q_block, given = q[:, :, :, block.queries], cotangent[:, :, :, block.queries]
    weights, sunk, slope = _weights(scoring, block, q_block, k, segments, sinks)
    of_v = of_v.at[:, :, block.keys].add(product("bkgts,bkgth->bksh", weights.astype(q.dtype), given))
    of_weights = product("bkgth,bksh->bkgts", given, v[:, :, block.keys])
    mean = jnp.sum(weights * of_weights, axis=-1, keepdims=True)
    of_scores = weights * (of_weights - mean) * scoring.scale
    of_scores = (of_scores if slope is None else of_scores * slope).astype(q.dtype)
    of_k = of_k.at[:, :, block.keys].add(product("bkgts,bkgth->bksh", of_scores, q_block))
    of_q.append(product("bkgts,bksh->bkgth", of_scores, k[:, :, block.keys]).astype(q.dtype))
    if of_sinks is not None:
      of_sinks = of_sinks - jnp.sum(sunk * mean, axis=(0, 3, 4))
  of_sinks = None if sinks is None else of_sinks.astype(sinks.dtype)
  return jnp.concatenate(of_q, axis=3), of_k.astype(k.dtype), of_v.astype(v.dtype), None, of_sinks


attend.defvjp(_forward, _backward)
