"""The gated delta rule, computed in parallel within chunks of positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from distill.axes.logical import platform

# (positions per chunk, chunks whose intermediate values are in memory at the same time). Small blocks of chunks stay in
# a CPU's cache; large ones give an accelerator work to do in parallel. A chunk of 128 fills the matrix unit of a TPU.
_SIZES = {"cpu": (64, 8), "gpu": (64, 32), "tpu": (128, 32)}
# By default, TPUs multiply float32 operands in one bfloat16 pass and GPUs in TF32.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def gated_delta_rule(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T N H"],
  v: Float[Array, "B T N P"],
  *,
  log_decay: Float[Array, "B T N"],
  beta: Float[Array, "B T N"],
  segments: Int[Array, "B T"],
  chunk: int | None = None,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N H P"]]:
  """Computes out_t = S_tᵀ q_t with S_t = exp(g_t) S_{t−1} + β_t k_t (v_t − exp(g_t) S_{t−1}ᵀ k_t)ᵀ.

  S is zero before each segment. Within a chunk the recurrence is one unit-triangular solve; a scan carries the state
  from chunk to chunk. The backward pass keeps only the state before each block of chunks and recomputes the rest, which
  is faster on a CPU than reading the rest from memory. All arithmetic is float32, on every platform.

  Args:
    q: Queries, already scaled.
    k: Keys of norm at most one.
    v: Values.
    log_decay: Logarithm g of the decay, at most 0.
    beta: Write strengths β, 0 to 1.
    segments: Segment number of each position; the positions of a segment must be contiguous.
    chunk: Positions per chunk, a power of two; None for the size that suits the platform. T need not be a multiple of
      it.

  Returns:
    (outputs, state S after the last position). A position with β = g = 0 does not change S.

  References:
    Yang et al. 2024, 2412.06464, section 3.3.
  """
  length = q.shape[1]
  best_chunk, block_chunks = _SIZES[platform()]
  chunk = min(chunk or best_chunk, 1 << (length - 1).bit_length())
  count = -(-length // chunk)
  blocks = -(-count // block_chunks)
  size = -(-count // blocks)
  pad = blocks * size * chunk - length

  def cut(x):
    """Zero-pads x to full blocks, casts it to float32 and rearranges it from [B,T,N,…] to [blocks,chunks,B,N,C,…].

    C is the number of positions in a chunk, and `chunks` the number of chunks in a block.
    """
    x = jnp.pad(x.astype(jnp.float32), [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], blocks, size, chunk, *x.shape[2:]), (1, 2, 4), (0, 1, 3))

  docs = jnp.pad(segments, ((0, 0), (0, pad)), mode="edge").reshape(-1, blocks, size, chunk)
  docs = jnp.moveaxis(docs, 0, 2)
  last = docs[..., -1].reshape(blocks * size, -1)
  previous = jnp.concatenate([jnp.full_like(last[:1], -2), last[:-1]]).reshape(docs.shape[:-1])
  state = jnp.zeros((q.shape[0], *q.shape[2:], v.shape[-1]), jnp.float32)
  xs = (*(cut(x) for x in (q, k, v, log_decay, beta)), docs, previous)
  state, out = jax.lax.scan(jax.checkpoint(_block, prevent_cse=False), state, xs)
  out = jnp.moveaxis(out, (0, 1, 3), (1, 2, 4))
  return out.reshape(out.shape[0], -1, *out.shape[4:])[:, :length], state


def gated_delta_rule_reference(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T N H"],
  v: Float[Array, "B T N P"],
  *,
  log_decay: Float[Array, "B T N"],
  beta: Float[Array, "B T N"],
  segments: Int[Array, "B T"],
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N H P"]]:
  """Computes `gated_delta_rule` by its definition, one position at a time.

  Args: as `gated_delta_rule`.
  """

  def step(carry, xs):
    state, segment_before = carry
    q, k, v, log_decay, beta, segment = xs
    decay = jnp.where(segment == segment_before, 1.0, 0.0)[:, None] * jnp.exp(log_decay)
    state = state * decay[..., None, None]
    error = (v - jnp.einsum("bnhp,bnh->bnp", state, k)) * beta[..., None]
    state = state + jnp.einsum("bnh,bnp->bnhp", k, error)
    return (state, segment), jnp.einsum("bnhp,bnh->bnp", state, q)

  state = jnp.zeros((q.shape[0], *q.shape[2:], v.shape[-1]), q.dtype)
  xs = tuple(x.swapaxes(0, 1) for x in (q, k, v, log_decay, beta, segments))
  (state, _), out = jax.lax.scan(step, (state, jnp.full_like(segments[:, 0], -1)), xs)
  return out.swapaxes(0, 1), state


def _block(state, xs):
  """Returns (state after a block of chunks, outputs of its chunks [chunks,B,N,C,P]).

  Shapes: q, k, v, g (logarithm of the decay) and beta [chunks,B,N,C,…], state [B,N,H,P], docs (segment numbers)
  [chunks,B,C], previous (segment number of the position before each chunk) [chunks,B].
  """
  q, k, v, g, beta, docs, previous = xs
  last = docs[..., -1]
  from_before = (docs == previous[..., None]).astype(jnp.float32)[:, :, None]
  to_after = (docs == last[..., None]).astype(jnp.float32)[:, :, None]
  same = (docs[..., :, None] == docs[..., None, :])[:, :, None]

  total = jnp.cumsum(g, axis=-1)
  gap = total[..., :, None] - total[..., None, :]
  order = jnp.arange(g.shape[-1])
  not_later = same & (order[:, None] >= order[None, :])[None, None, None]
  decay_TS = jnp.exp(jnp.where(not_later, gap, -jnp.inf))
  strictly = jnp.where(order[:, None] > order[None, :], decay_TS, 0.0)

  keys = k * beta[..., None]
  mixing = _einsum("...td,...sd->...ts", keys, k) * strictly
  entering = (from_before * jnp.exp(total))[..., None]
  right = jnp.concatenate([v * beta[..., None], keys * entering], axis=-1)
  solved = _matmul(unit_lower_inverse(mixing), right)
  written, read = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
  attention = _einsum("...td,...sd->...ts", q, k) * decay_TS
  leaving = k * (to_after * jnp.exp(total[..., -1:] - total))[..., None]
  carried = (previous == last).astype(jnp.float32)[:, :, None] * jnp.exp(total[..., -1])

  def body(state, xs):
    written, read, attention, queries, leaving, carried = xs
    update = written - _matmul(read, state)
    out = _matmul(queries, state) + _matmul(attention, update)
    return state * carried[..., None, None] + _matmul(leaving.swapaxes(-1, -2), update), out

  return jax.lax.scan(body, state, (written, read, attention, q * entering, leaving, carried))


@jax.custom_vjp
def unit_lower_inverse(a: Float[Array, "*B C C"]) -> Float[Array, "*B C C"]:
  """Returns (I + a)⁻¹ for strictly lower triangular `a` whose size is a power of two.

  The inverse is built from diagonal blocks, which double in size at every step by the identity
  [[P, 0], [A, Q]]⁻¹ = [[P⁻¹, 0], [−Q⁻¹ A P⁻¹, Q⁻¹]]. This takes only matmuls. It is also numerically stable when keys
  repeat, where a product of powers of `a` is not.

  Workaround: LAPACK's batched triangular solve has been seen to hang in XLA's CPU thread pool (jaxlib 0.10.2).
  """
  return _inverse_by_slices(a) if platform() == "cpu" else _inverse_by_masks(a)


def _inverse_by_slices(a):
  """Computes `unit_lower_inverse` on the diagonal blocks alone: the least arithmetic."""
  size, lead = a.shape[-1], a.shape[:-2]
  inverse = jnp.ones((*lead, size, 1, 1), a.dtype)
  width = 1
  while width < size:
    count = size // (2 * width)
    below = a.reshape(*lead, count, 2, width, count, 2, width)[..., :, 1, :, :, 0, :]
    below = jnp.moveaxis(jnp.diagonal(below, axis1=-4, axis2=-2), -1, -3)
    first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
    corner = _matmul(_matmul(-second, below), first)
    top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    inverse = jnp.concatenate([top, jnp.concatenate([corner, second], axis=-1)], axis=-2)
    width *= 2
  return inverse[..., 0, :, :]


def _inverse_by_masks(a):
  """Computes `unit_lower_inverse` by products of whole matrices: no gathers, slices or concatenations.

  With X the inverses of the diagonal blocks and A the blocks below them, the next X is X − X A X. A TPU pays more for
  moving small blocks than for multiplying zeros.
  """
  order = np.arange(a.shape[-1])
  inverse = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)
  width = 1
  while width < a.shape[-1]:
    block = order // width
    below = jnp.where((block % 2 == 1)[:, None] & (block[:, None] == block[None, :] + 1), a, 0.0)
    # Blocks of one row are their own inverses.
    inverse = inverse - (below if width == 1 else _matmul(inverse, _matmul(below, inverse)))
    width *= 2
  return inverse


def _inverse_forward(a):
  inverse = unit_lower_inverse(a)
  return inverse, inverse


def _inverse_backward(inverse, cotangent):
  transposed = inverse.swapaxes(-1, -2)
  return (_matmul(_matmul(-transposed, cotangent), transposed),)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)
