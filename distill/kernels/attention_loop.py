"""Causal softmax attention as one loop over pairs of blocks, for accelerators."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Queries and keys per block. The scores of a block are [B, K, G, 512, 512], whatever the length of the rows.
_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Scoring:
  """Static arguments of `attention`, hashable as `jax.custom_vjp` requires."""

  scale: float
  softcap: float | None
  window: int | None


def looped_attention(
  scoring: Scoring,
  q: Float[Array, "B K G T H"],
  k: Float[Array, "B K T H"],
  v: Float[Array, "B K T H"],
  segments: Int[Array, "B T"],
  sinks: Float[Array, "K G"] | None = None,
) -> Float[Array, "B K G T H"]:
  """Computes `attention` by one compiled body, which a loop runs for each pair of query block and key block.

  Pairs above the diagonal or beyond the window are left out. Compile time does not depend on T, and memory is linear
  in T: a running max and sum of each query take the place of its row of scores (Dao et al. 2022, 2205.14135).
  """
  length = q.shape[3]
  pad = -length % min(_BLOCK, length)
  # Causality hides the padding from all queries but those of the padding.
  q, k, v = (jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, pad), (0, 0)]) for x in (q, k, v))
  return _looped(scoring, q, k, v, jnp.pad(segments, [(0, 0), (0, pad)]), sinks)[:, :, :, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _looped(scoring, q, k, v, segments, sinks):
  return _forward(scoring, q, k, v, segments, sinks)[0]


def _pairs(length: int, window: int | None) -> Int[np.ndarray, "pairs 2"]:
  """Returns the first query and the first key of every pair of blocks with a score that is not masked.

  The pairs of a block of queries follow each other and end on the diagonal, where every query sees itself: what fully
  masked rows of earlier blocks have added is then multiplied by exp(−inf) = 0.
  """
  size = min(_BLOCK, length)
  starts = range(0, length, size)
  near = length if window is None else window
  return np.asarray([(i, j) for i in starts for j in starts if j <= i and i - (j + size - 1) < near], np.int32)


def _einsum(formula, *operands):
  # Without it TPUs multiply float32 operands as bfloat16, and GPUs as TF32.
  precision = jax.lax.Precision.HIGHEST if operands[0].dtype == jnp.float32 else None
  return jnp.einsum(formula, *operands, precision=precision, preferred_element_type=jnp.float32)


def _scores(scoring, q, k, segments, pair):
  """Returns scores [B,K,G,C,C] of a pair of blocks, and the derivative of the softcap or None."""
  scores = _einsum("bkgth,bksh->bkgts", q, k) * scoring.scale
  softcap_slope = None
  if scoring.softcap is not None:
    capped = jnp.tanh(scores / scoring.softcap)
    scores, softcap_slope = scoring.softcap * capped, 1.0 - jnp.square(capped)
  size = q.shape[3]
  # Positions of a segment are neighbours, so a distance in the row is a distance in the segment.
  distance = pair[0] - pair[1] + jnp.arange(size)[:, None] - jnp.arange(size)[None, :]
  near = (distance >= 0) if scoring.window is None else (distance >= 0) & (distance < scoring.window)
  query_segments, key_segments = (_cut(start, size, axis=1)(segments) for start in pair)
  mask = near[None] & (query_segments[:, :, None] == key_segments[:, None, :])
  return jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min), softcap_slope


def _cut(start, size, *, axis):
  return functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=axis)


def _put(start, *, axis):
  return functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=axis)


def _forward(scoring, q, k, v, segments, sinks):
  size = min(_BLOCK, q.shape[3])
  if sinks is None:
    max_score, total = jnp.full(q.shape[:4], jnp.finfo(jnp.float32).min), jnp.zeros(q.shape[:4], jnp.float32)
  else:
    max_score = jnp.broadcast_to(sinks.astype(jnp.float32)[None, :, :, None], q.shape[:4])
    total = jnp.ones(q.shape[:4], jnp.float32)

  def step(carry, pair):
    query, key = pair
    queries, keys = _cut(query, size, axis=3), _cut(key, size, axis=2)
    out, max_score, total = map(queries, carry)
    scores, _ = _scores(scoring, queries(q), keys(k), segments, pair)
    new_max = jnp.maximum(max_score, jnp.max(scores, axis=-1))
    exp_scores, decay = jnp.exp(scores - new_max[..., None]), jnp.exp(max_score - new_max)
    values = _einsum("bkgts,bksh->bkgth", exp_scores.astype(q.dtype), keys(v))
    new = out * decay[..., None] + values, new_max, total * decay + jnp.sum(exp_scores, axis=-1)
    return jax.tree.map(_put(query, axis=3), carry, new), None

  carry = jnp.zeros(q.shape, jnp.float32), max_score, total
  (out, max_score, total), _ = jax.lax.scan(step, carry, _pairs(q.shape[3], scoring.window))
  out, logsumexp = out / total[..., None], max_score + jnp.log(total)
  return out, (q, k, v, segments, sinks, out, logsumexp)


def _backward(scoring, saved, cotangent):
  q, k, v, segments, sinks, out, logsumexp = saved
  size = min(_BLOCK, q.shape[3])
  mean = jnp.sum(out * cotangent, axis=-1)
  cotangent = cotangent.astype(q.dtype)

  def step(grads, pair):
    query, key = pair
    queries, keys = _cut(query, size, axis=3), _cut(key, size, axis=2)
    q_grad, k_grad, v_grad = grads
    scores, softcap_slope = _scores(scoring, queries(q), keys(k), segments, pair)
    weights = jnp.exp(scores - queries(logsumexp)[..., None])
    weights_grad = _einsum("bkgth,bksh->bkgts", queries(cotangent), keys(v))
    scores_grad = weights * (weights_grad - queries(mean)[..., None]) * scoring.scale
    scores_grad = (scores_grad if softcap_slope is None else scores_grad * softcap_slope).astype(q.dtype)
    q_new = queries(q_grad) + _einsum("bkgts,bksh->bkgth", scores_grad, keys(k))
    k_new = keys(k_grad) + _einsum("bkgts,bkgth->bksh", scores_grad, queries(q))
    v_new = keys(v_grad) + _einsum("bkgts,bkgth->bksh", weights.astype(q.dtype), queries(cotangent))
    put_keys = _put(key, axis=2)
    return (_put(query, axis=3)(q_grad, q_new), put_keys(k_grad, k_new), put_keys(v_grad, v_new)), None

  zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
  (q_grad, k_grad, v_grad), _ = jax.lax.scan(step, zeros, _pairs(q.shape[3], scoring.window))
  sinks_grad = None
  if sinks is not None:
    weights = jnp.exp(sinks.astype(jnp.float32)[None, :, :, None] - logsumexp)
    sinks_grad = -jnp.sum(weights * mean, axis=(0, 3)).astype(sinks.dtype)
  return q_grad.astype(q.dtype), k_grad.astype(k.dtype), v_grad.astype(v.dtype), None, sinks_grad


_looped.defvjp(_forward, _backward)
