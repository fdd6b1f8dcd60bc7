"""State-space duality (SSD): the recurrence of Mamba-2, computed in parallel within chunks of positions."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distill.axes.logical import platform

# (positions per chunk, chunks whose intermediate values are in memory at the same time). One chunk stays in a CPU's
# cache; many give an accelerator work to do in parallel. A chunk of 128 fills the matrix unit of a TPU.
_SIZES = {"cpu": (64, 1), "gpu": (64, 32), "tpu": (128, 32)}
# Log-decays are summed in two parts. The coarse part is a multiple of 2⁻¹⁰, at least −100, so that its sums over a
# chunk of up to 163 positions are exact in float32.
_COARSE = 2.0**10
_MIN_LOG_DECAY = -100.0
# By default, TPUs multiply float32 operands in one bfloat16 pass and GPUs in TF32.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def ssd(
  x: Float[Array, "B T N P"],
  *,
  log_decay: Float[Array, "B T N"],
  b: Float[Array, "B T K H"],
  c: Float[Array, "B T K H"],
  segments: Int[Array, "B T"],
  chunk: int | None = None,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N H P"]]:
  """Computes out_t = S_tᵀ c_t with S_t = exp(g_t) S_{t−1} + b_t x_tᵀ.

  S is zero before each segment. Within a chunk the recurrence is masked attention without a softmax; a scan carries the
  state from chunk to chunk. The backward pass recomputes each chunk from the state before it: memory is linear in T,
  and on a CPU this is faster than saving the chunk's [C, C] arrays. All arithmetic is float32, on every platform.

  Args:
    x: Inputs, already multiplied by their time steps.
    log_decay: Logarithm g of the decay, at most 0.
    b: Vectors that write to the state, one for each of K groups of neighbouring heads.
    c: Vectors that read the state, one for each group.
    segments: Segment number of each position; the positions of a segment must be contiguous.
    chunk: Positions per chunk; None for the size that suits the platform. T need not be a multiple of it.

  Returns:
    (outputs, state S after the last position). A position with x = g = 0 does not change S.

  References:
    Dao & Gu 2024, 2405.21060, section 6.
  """
  batch, length, heads, _ = x.shape
  groups = b.shape[2]
  best_chunk, block_chunks = _SIZES[platform()]
  chunk = min(chunk or best_chunk, length)
  blocks = -(-length // (chunk * block_chunks))
  # Chunks per block: no more than there are.
  size = -(-length // (chunk * blocks))
  count = blocks * size

  def cut(y):
    """Pads y, casts it to float32 and cuts it into chunks of C positions and K groups of G = N / K heads.

    x [B,T,N,P] becomes [chunks,B,C,K,G*P]; log_decay [B,T,N] becomes [chunks,B,C,K,G]; b and c [B,T,K,H] become
    [chunks,B,C,K,H].
    """
    y = jnp.pad(y.astype(jnp.float32), [(0, 0), (0, count * chunk - length)] + [(0, 0)] * (y.ndim - 2))
    return jnp.moveaxis(y.reshape(batch, count, chunk, groups, -1), 1, 0)

  x_chunks, b, c = (cut(y).swapaxes(2, 3) for y in (x, b, c))
  g = jnp.moveaxis(cut(jnp.maximum(log_decay, _MIN_LOG_DECAY)), 2, 4)
  # Padding belongs to the last segment, neither decays nor writes, and so leaves the state as it is.
  docs = jnp.pad(segments, ((0, 0), (0, count * chunk - length)), mode="edge").reshape(batch, count, chunk)
  docs = jnp.moveaxis(docs, 1, 0)
  previous = jnp.concatenate([docs[:1, :, 0], docs[:-1, :, -1]])

  state = jnp.zeros((batch, groups, b.shape[-1], x_chunks.shape[-1]), jnp.float32)
  xs, step = (x_chunks, b, c, g, docs, previous), _one_chunk
  if block_chunks > 1:
    xs, step = jax.tree.map(lambda y: y.reshape(blocks, size, *y.shape[1:]), xs), _chunk_block
  state, out = jax.lax.scan(jax.checkpoint(step), state, xs)
  out = jnp.moveaxis(out.reshape(count, *out.shape[-4:]), (0, 2), (1, 3))
  out = out.reshape(batch, count * chunk, heads, -1)[:, :length]
  state = state.reshape(batch, groups, b.shape[-1], heads // groups, -1).swapaxes(2, 3)
  return out, state.reshape(batch, heads, b.shape[-1], -1)


def ssd_reference(
  x: Float[Array, "B T N P"],
  *,
  log_decay: Float[Array, "B T N"],
  b: Float[Array, "B T K H"],
  c: Float[Array, "B T K H"],
  segments: Int[Array, "B T"],
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N H P"]]:
  """Computes `ssd` by its definition, one position at a time.

  Args: as `ssd`.
  """
  b, c = (jnp.repeat(y, x.shape[2] // b.shape[2], axis=2) for y in (b, c))
  same = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (1, 0)))
  decay = jnp.where(same[..., None], jnp.exp(log_decay), 0.0)

  def step(state, xs):
    x, decay, b, c = xs
    state = state * decay[..., None, None] + jnp.einsum("bnh,bnp->bnhp", b, x)
    return state, jnp.einsum("bnhp,bnh->bnp", state, c)

  state = jnp.zeros((x.shape[0], x.shape[2], b.shape[-1], x.shape[-1]), x.dtype)
  state, out = jax.lax.scan(step, state, tuple(y.swapaxes(0, 1) for y in (x, decay, b, c)))
  return out.swapaxes(0, 1), state


def _one_chunk(state, xs):
  """Returns (state after a chunk, outputs of the chunk); `xs` is (x, b, c, g, docs, previous).

  Shapes: x [B,K,C,G*P], b and c [B,K,C,H], g (logarithm of the decay) [B,K,G,C], state [B,K,H,G*P], with G heads in
  each of K groups; docs (segment numbers) [B,C], previous (segment number of the position before the chunk) [B].
  """
  x, _, c, *_ = xs
  near, entering, added, carried = _within_chunk(*xs)
  far = _matmul(c, state).reshape(entering.shape[:-1] + (-1,)) * entering
  return _carried(state, carried) + added, (near + far).reshape(x.shape)


def _chunk_block(state, xs):
  """Computes `_one_chunk` for a block of chunks [chunks,…]: all products at once, and a scan of sums for the states."""
  x, _, c, *_ = xs
  near, entering, added, carried = jax.vmap(_within_chunk)(*xs)
  state, before = jax.lax.scan(lambda state, xs: (_carried(state, xs[0]) + xs[1], state), state, (carried, added))
  far = _matmul(c, before).reshape(entering.shape[:-1] + (-1,)) * entering
  return state, (near + far).reshape(x.shape)


def _carried(state, carried):
  """Returns what is left of the state [B,K,H,G*P] after a chunk."""
  return (state.reshape(*state.shape[:3], carried.shape[3], -1) * carried).reshape(state.shape)


def _within_chunk(x, b, c, g, docs, previous):
  """Returns what can be computed of a chunk without the state before it.

  That is: the part of the outputs that its own positions contribute [B,K,C,G,P]; the decay of the state before it up to
  each position [B,K,C,G,1]; what it adds to the state; and the decay of the state over the chunk [B,K,1,G,1].
  """
  batch, groups, chunk, _ = x.shape
  last = docs[:, -1]
  heads = (batch, groups, chunk, g.shape[2], -1)

  # With a single float32 sum, a strong decay would swallow the digits of weak ones in the differences below.
  coarse = jax.lax.stop_gradient(jnp.round(g * _COARSE) / _COARSE)
  high, low = jnp.cumsum(coarse, axis=-1), jnp.cumsum(g - coarse, axis=-1)
  gap = (high[..., :, None] - high[..., None, :]) + (low[..., :, None] - low[..., None, :])
  left = (high[..., -1:] - high) + (low[..., -1:] - low)
  total = high + low

  order = jnp.arange(chunk)
  not_later = (docs[:, :, None] == docs[:, None, :]) & (order[:, None] >= order[None, :])[None]
  decay_BKGTS = jnp.exp(jnp.where(not_later[:, None, None], gap, -jnp.inf))
  entering = jnp.where((docs == previous[:, None])[:, None, None], jnp.exp(total), 0.0).swapaxes(2, 3)[..., None]
  leaving = jnp.where((docs == last[:, None])[:, None, None], jnp.exp(left), 0.0).swapaxes(2, 3)[..., None]
  carried = jnp.where((previous == last)[:, None, None], jnp.exp(total[..., -1]), 0.0)[:, :, None, :, None]

  scores_BKTS = _einsum("bkth,bksh->bkts", c, b)
  near = _matmul(scores_BKTS[:, :, None] * decay_BKGTS, x.reshape(heads).swapaxes(2, 3)).swapaxes(2, 3)
  added = _matmul(b.swapaxes(2, 3), (x.reshape(heads) * leaving).reshape(x.shape))
  return near, entering, added, carried
