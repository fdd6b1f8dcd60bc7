"""Causal softmax attention for training and prefill, in the form that suits the platform."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distill.axes.logical import Axes, each_shard, platform
from distill.kernels.attention_cudnn import cudnn_attention, cudnn_takes
from distill.kernels.attention_loop import Scoring, looped_attention

# Queries per block. A block's scores should stay in a CPU's cache, yet its matmuls should be large.
_BLOCK_QUERIES = 128
# Each block is compiled separately, so compile time grows with their number.
_MAX_BLOCKS = 8


def attention(
  q: Float[Array, "B K G T H"],
  k: Float[Array, "B K T H"],
  v: Float[Array, "B K T H"],
  *,
  segments: Int[Array, "B T"],
  scale: float,
  softcap: float | None = None,
  window: int | None = None,
  sinks: Float[Array, "K G"] | None = None,
) -> Float[Array, "B K G T H"]:
  """Computes causal attention within each segment: softmax(scale · q kᵀ) v.

  Operands of matmuls keep q's dtype; scores, softmax and sums are float32, and so are products of float32 operands on
  every backend. Keys after a block of queries are left out, which saves nearly half of the work on long rows. Memory
  is linear in T: the backward pass recomputes the weights of each block.

  A CPU computes a few large blocks of queries one after the other, a TPU splash attention, and a GPU cuDNN's flash
  attention where that has the features, else a loop over small blocks. The kernels of TPU and GPU round their result
  to q's dtype.

  Args:
    q: Queries; G query heads share each of the K key heads.
    k: Keys.
    v: Values.
    segments: Segment number of each position. Positions attend only within their segment, whose positions must be
      contiguous.
    scale: Multiplies the products of queries and keys.
    softcap: Scores become softcap * tanh(score / softcap); None for no cap.
    window: A position attends to itself and the window − 1 positions before it; None for all positions before it.
    sinks: One more logit in the softmax of each query head; it takes a part of the weight, but has no value. None for
      no sinks.

  Returns:
    The weighted values, float32.

  References:
    Vaswani et al. 2017, 1706.03762; Ainslie et al. 2023, 2305.13245 (grouped heads); Dao et al. 2022, 2205.14135
    (recomputation in the backward pass).
  """
  scoring = Scoring(scale, softcap, window)
  if platform() == "cpu":
    return _blocked(scoring, q, k, v, segments, sinks)
  arguments = (q, k, v, segments) if sinks is None else (q, k, v, segments, sinks)
  run = each_shard(_kernel(scoring, q, sinks), inputs=_AXES[: len(arguments)], outputs=[_AXES[0]], like=[*arguments, q])
  return run(*arguments)


# Logical axes of q, k, v, segments and sinks. A device has whole rows, of some of the key heads and their queries.
_AXES: tuple[Axes, ...] = (
  ("batch", "kv_heads", None, None, None),
  ("batch", "kv_heads", None, None),
  ("batch", "kv_heads", None, None),
  ("batch", None),
  ("kv_heads", None),
)


def _kernel(scoring, q, sinks):
  """Returns the function of q, k, v, segments and, if there are any, sinks that an accelerator runs."""
  if platform() == "tpu":
    # No other backend needs Pallas, which takes 0.14 s to import.
    from distill.kernels.attention_splash import splash_attention, splash_takes

    chosen = splash_attention if splash_takes(q) else looped_attention
  else:
    chosen = cudnn_attention if cudnn_takes(scoring, q, sinks) else looped_attention
  return functools.partial(chosen, scoring)


def attention_reference(
  q: Float[Array, "B K G T H"],
  k: Float[Array, "B K T H"],
  v: Float[Array, "B K T H"],
  *,
  segments: Int[Array, "B T"],
  scale: float,
  softcap: float | None = None,
  window: int | None = None,
  sinks: Float[Array, "K G"] | None = None,
) -> Float[Array, "B K G T H"]:
  """Computes `attention` by its definition, with all scores [B,K,G,T,T] in memory.

  Args: as `attention`.
  """
  length = q.shape[3]
  scores = jnp.einsum("bkgth,bksh->bkgts", q, k) * scale
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  distance = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
  mask = (distance >= 0) & (distance < (length if window is None else window))
  mask = mask[None] & (segments[:, :, None] == segments[:, None, :])
  scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
  if sinks is not None:
    column = jnp.broadcast_to(sinks[:, :, None, None], (*scores.shape[:-1], 1))
    scores = jnp.concatenate([scores, column], axis=-1)
  return jnp.einsum("bkgts,bksh->bkgth", jax.nn.softmax(scores, axis=-1)[..., :length], v)


@dataclasses.dataclass(frozen=True)
class _QueryBlock:
  """Queries from `start` to `stop`, exclusive; they attend at most to the keys from `first_key` to `stop`."""

  start: int
  stop: int
  first_key: int

  @property
  def queries(self) -> slice:
    return slice(self.start, self.stop)

  @property
  def keys(self) -> slice:
    return slice(self.first_key, self.stop)


def _blocks(length: int, window: int | None) -> Iterator[_QueryBlock]:
  size = max(_BLOCK_QUERIES, -(-length // _MAX_BLOCKS))
  for start in range(0, length, size):
    yield _QueryBlock(start, min(start + size, length), 0 if window is None else max(0, start - window + 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(scoring, q, k, v, segments, sinks):
  out = []
  for block in _blocks(q.shape[3], scoring.window):
    weights = _weights(scoring, block, q[:, :, :, block.queries], k, segments, sinks)[0]
    out.append(_einsum("bkgts,bksh->bkgth", weights.astype(q.dtype), v[:, :, block.keys]))
  return jnp.concatenate(out, axis=3)


def _einsum(formula, *operands):
  return jnp.einsum(formula, *operands, preferred_element_type=jnp.float32)


def _weights(scoring, block, q, k, segments, sinks):
  """Computes the attention weights of one block of C queries, over the S keys that it may attend to.

  Args:
    scoring: Static arguments of `attention`.
    block: Indices of the block's queries and keys within the row.
    q: The queries of the block [B,K,G,C,H].
    k: The keys of the whole row [B,K,T,H].
    segments: Segment numbers of the whole row [B,T].
    sinks: Sink logits [K,G], or None.

  Returns:
    (attention weights [B,K,G,C,S], weights of the sinks [B,K,G,C,1] or None without sinks, derivative of the softcap
    [B,K,G,C,S] or None without a softcap).
  """
  scores = _einsum("bkgth,bksh->bkgts", q, k[:, :, block.keys]) * scoring.scale
  softcap_slope = None
  if scoring.softcap is not None:
    capped = jnp.tanh(scores / scoring.softcap)
    scores, softcap_slope = scoring.softcap * capped, 1.0 - jnp.square(capped)
  # Positions of a segment are neighbours, so a distance in the row is a distance in the segment.
  distance = jnp.arange(block.start, block.stop)[:, None] - jnp.arange(block.first_key, block.stop)[None, :]
  near = (distance >= 0) if scoring.window is None else (distance >= 0) & (distance < scoring.window)
  mask = near[None] & (segments[:, block.queries, None] == segments[:, None, block.keys])
  scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
  max_score = jnp.max(scores, axis=-1, keepdims=True)
  if sinks is None:
    exp_scores = jnp.exp(scores - max_score)
    return exp_scores / jnp.sum(exp_scores, axis=-1, keepdims=True), None, softcap_slope
  sinks = sinks.astype(jnp.float32)[None, :, :, None, None]
  max_score = jnp.maximum(max_score, sinks)
  exp_scores, exp_sinks = jnp.exp(scores - max_score), jnp.exp(sinks - max_score)
  total = jnp.sum(exp_scores, axis=-1, keepdims=True) + exp_sinks
  return exp_scores / total, exp_sinks / total, softcap_slope


def _forward(scoring, q, k, v, segments, sinks):
  return _blocked(scoring, q, k, v, segments, sinks), (q, k, v, segments, sinks)


def _backward(scoring, saved, cotangent):
  q, k, v, segments, sinks = saved
  cotangent = cotangent.astype(q.dtype)
  k_grad, v_grad = (jnp.zeros(x.shape, jnp.float32) for x in (k, v))
  q_grads = []
  sinks_grad = None if sinks is None else jnp.zeros(sinks.shape, jnp.float32)
  for block in _blocks(q.shape[3], scoring.window):
    q_block, out_grad = q[:, :, :, block.queries], cotangent[:, :, :, block.queries]
    weights, sink_weights, softcap_slope = _weights(scoring, block, q_block, k, segments, sinks)
    v_grad = v_grad.at[:, :, block.keys].add(_einsum("bkgts,bkgth->bksh", weights.astype(q.dtype), out_grad))
    weights_grad = _einsum("bkgth,bksh->bkgts", out_grad, v[:, :, block.keys])
    mean = jnp.sum(weights * weights_grad, axis=-1, keepdims=True)
    scores_grad = weights * (weights_grad - mean) * scoring.scale
    scores_grad = (scores_grad if softcap_slope is None else scores_grad * softcap_slope).astype(q.dtype)
    k_grad = k_grad.at[:, :, block.keys].add(_einsum("bkgts,bkgth->bksh", scores_grad, q_block))
    q_grads.append(_einsum("bkgts,bksh->bkgth", scores_grad, k[:, :, block.keys]).astype(q.dtype))
    if sinks_grad is not None:
      sinks_grad = sinks_grad - jnp.sum(sink_weights * mean, axis=(0, 3, 4))
  sinks_grad = None if sinks is None else sinks_grad.astype(sinks.dtype)
  return jnp.concatenate(q_grads, axis=3), k_grad.astype(k.dtype), v_grad.astype(v.dtype), None, sinks_grad


_blocked.defvjp(_forward, _backward)
