"""Causal softmax attention on a TPU, by JAX's splash attention kernels (Pallas)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Array, Float, Int

from distill.kernels.attention_loop import Scoring

# Vectors of a TPU have 128 lanes, and the kernels take keys in multiples of them.
_LANES = 128
# Queries, and keys per product, of a block.
_MAX_BLOCK = 512
# The widest heads whose blocks fit the 16 MiB of vector memory that the compiler gives a kernel on v5e and v5p.
_MAX_WIDTH = 256


@dataclasses.dataclass(frozen=True)
class _Kernel:
  """Static arguments of a kernel, hashable as `jax.custom_vjp` requires.

  Attributes:
    scoring: Softcap and window; the scale is already part of the queries.
    length: Length T of the rows, a multiple of the blocks.
    exact: Operands are float32, and so are their products.
    width: Head width H.
    interpret: The kernel runs as XLA operations, for tests without a TPU.
  """

  scoring: Scoring
  length: int
  exact: bool
  width: int
  interpret: bool


def splash_takes(q: Float[Array, "B K G T H"]) -> bool:
  """Returns whether `splash_attention` compiles for heads of this width."""
  return q.shape[-1] <= _MAX_WIDTH


def splash_attention(
  scoring: Scoring,
  q: Float[Array, "B K G T H"],
  k: Float[Array, "B K T H"],
  v: Float[Array, "B K T H"],
  segments: Int[Array, "B T"],
  sinks: Float[Array, "K G"] | None = None,
  *,
  interpret: bool = False,
) -> Float[Array, "B K G T H"]:
  """Computes `attention` by splash attention; `scale * q` and the result are rounded to q's dtype.

  Each key head has its group of query heads as one multi-query kernel. Keys and values are not repeated, and the two
  cores of a v5p chip share the key heads. Queries and their gradient, and keys and theirs, have a backward kernel each:
  the fused one of the library writes the gradient of the queries once for every block of keys, so its memory is
  quadratic in T (8.7 GB at T 32,768 with 32 heads of 128), and the compiler expects the sum of these parts to take
  longer than the two products that fusion saves.

  Args: as `attention`, and
    interpret: Runs the kernels as XLA operations, for tests without a TPU.
  """
  length = q.shape[3]
  pad = -length % _block(length)
  # Causality hides the padding from all queries but those of the padding.
  q = (q.astype(jnp.float32) * scoring.scale).astype(q.dtype)
  q, k, v = (jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, pad), (0, 0)]) for x in (q, k, v))
  segments = jnp.pad(segments, [(0, 0), (0, pad)])
  exact = q.dtype == jnp.float32
  kernel = _Kernel(scoring, length=length + pad, exact=exact, width=q.shape[-1], interpret=interpret)
  return _attend(kernel, q, k, v, segments, sinks)[:, :, :, :length].astype(jnp.float32)


def _block(length: int) -> int:
  """Returns the number of queries of a block; rows are padded to a multiple of it."""
  return min(_MAX_BLOCK, length + -length % _LANES)


def _block_sizes(kernel: _Kernel) -> splash_attention_kernel.BlockSizes:
  """Returns block sizes that the compiler accepts for every width up to `_MAX_WIDTH` on v5e, v5p and v6e."""
  part = _block(kernel.length)
  # Large blocks share the loads of an operand. Those of wide heads or of float32 do not fit the vector memory, and a
  # short window leaves most of a large block unused.
  window = kernel.scoring.window
  large = not kernel.exact and kernel.length % (2 * part) == 0 and (window is None or window > part)
  keys = 2 * part if large else part
  queries = keys if kernel.width <= _LANES else part
  return splash_attention_kernel.BlockSizes(
    block_q=queries,
    block_kv=keys,
    block_kv_compute=part,
    block_q_dkv=queries,
    block_kv_dkv=keys,
    block_kv_dkv_compute=part,
    block_q_dq=queries,
    block_kv_dq=keys,
  )


@functools.lru_cache(maxsize=64)
def _build(kernel: _Kernel) -> Any:
  """Returns the kernel of one key head; to find the blocks that are not masked takes a second at T 32,768."""
  shape = (kernel.length, kernel.length)
  window = kernel.scoring.window
  mask: Any = splash_attention_mask.CausalMask(shape)
  if window is not None:
    mask = splash_attention_mask.LocalMask(shape, window_size=(window - 1, 0), offset=0)
  with jax.ensure_compile_time_eval():
    built = splash_attention_kernel.make_splash_mqa(
      # One mask serves all query heads.
      splash_attention_mask.MultiHeadMask([mask]),
      block_sizes=_block_sizes(kernel),
      attn_logits_soft_cap=kernel.scoring.softcap,
      head_shards=1,
      q_seq_shards=1,
      interpret=kernel.interpret,
    )
  # Arrays of numpy, as those of JAX would tie the kernel to the devices of its first use.
  return jax.tree.map(np.asarray, built)


def _run(kernel, q, k, v, segments, sinks):
  of_heads = jax.vmap(_build(kernel), in_axes=(0, 0, 0, None, 0))
  ids = splash_attention_kernel.SegmentIds(q=segments, kv=segments)
  return jax.vmap(of_heads, in_axes=(0, 0, 0, 0, None))(q, k, v, ids, sinks)


def _precision(kernel):
  """Returns a context for the tracing of kernels, whose products state no precision of their own.

  By default a TPU multiplies float32 operands as bfloat16. 'highest' makes it six such products, exact to float32.
  """
  return jax.default_matmul_precision("highest" if kernel.exact else "default")


# The rules of the library's kernel are traced when it is differentiated, outside of the forward pass's precision.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(kernel, q, k, v, segments, sinks):
  with _precision(kernel):
    return _run(kernel, q, k, v, segments, sinks)


def _forward(kernel, q, k, v, segments, sinks):
  with _precision(kernel):
    return jax.vjp(lambda q, k, v, sinks: _run(kernel, q, k, v, segments, sinks), q, k, v, sinks)


def _backward(kernel, pullback, cotangent):
  with _precision(kernel):
    q_grad, k_grad, v_grad, sinks_grad = pullback(cotangent)
  return q_grad, k_grad, v_grad, None, sinks_grad


_attend.defvjp(_forward, _backward)
