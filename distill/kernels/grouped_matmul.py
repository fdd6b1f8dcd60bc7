"""Matrix products of consecutive groups of rows, each group with a matrix of its own: the experts of an MoE layer."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distill.axes.logical import platform
from distill.kernels.matmul import transposed
from distill.kernels.saved_bits import as_bits

# Most rows of one product on a CPU, and on a GPU.
_CPU_BLOCK = 64
_GPU_BLOCK = 128
# Blocks of one batched product on a GPU: their matrices are gathered, which takes memory.
_GPU_BATCH = 32
# Rows of a tile on a TPU, and bytes of the tiles of one product; a kernel has 16 MiB of VMEM.
_TPU_BLOCK = 128
_TPU_BYTES = 9 << 20


def grouped_matmul(
  x: Float[Array, "M I"], kernel: Float[Array, "E I O"], *, sizes: Int[Array, " E"]
) -> Float[Array, "M O"]:
  """Computes x[m] @ kernel[e] for every row m of group e; the first sizes[0] rows are group 0, then comes group 1.

  Operands have x's dtype and sums are float32, in the forward and the backward pass; float32 operands are multiplied
  at full precision on every backend. The backward pass rounds the cotangent to x's dtype. The work is that of the rows,
  with each group's rows filled up to whole blocks:

  - CPU: a loop over the groups that have rows, and within it one over blocks of at most 64 rows. XLA's own ragged_dot
    (jaxlib 0.10.2) masks and multiplies all rows by all matrices.
  - GPU: a batched product over blocks of at most 128 rows, whose matrices are gathered. XLA's ragged_dot does there
    what it does on a CPU.
  - TPU: the kernels gmm and tgmm of jax's megablox. XLA's ragged_dot is a kernel there, too, but the gradient by
    `kernel` multiplies all rows for all groups (libtpu 0.0.42).

  Args:
    x: Rows, sorted by group.
    kernel: The matrix of each group.
    sizes: Rows of each group, int32. Rows after the last group may be anything, even NaN.

  Returns:
    The products, float32; rows after the last group are unspecified. The gradients of x and of `kernel` have their
    dtypes; that of x is unspecified after the last group.

  References:
    Gale et al. 2022, 2211.15841 (MegaBlocks).
  """
  return _grouped(platform(), x, kernel, sizes)


def grouped_matmul_reference(
  x: Float[Array, "M I"], kernel: Float[Array, "E I O"], *, sizes: Int[Array, " E"]
) -> Float[Array, "M O"]:
  """Computes `grouped_matmul` by its definition: all rows times all matrices; rows after the last group are zero."""
  ends = jnp.cumsum(sizes)
  rows = jnp.arange(x.shape[0], dtype=sizes.dtype)[:, None]
  inside = (rows >= (ends - sizes)[None]) & (rows < ends[None])
  return jnp.einsum("mi,eio,me->mo", x, kernel, inside.astype(x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(backend, x, kernel, sizes):
  return _FORMS[backend][0](x, kernel, sizes, transpose=False)


def _forward(backend, x, kernel, sizes):
  return _grouped(backend, x, kernel, sizes), (x, kernel, sizes)


def _backward(backend, saved, cotangent):
  x, kernel, sizes = saved
  rows_form, kernel_form = _FORMS[backend]
  cotangent = cotangent.astype(x.dtype)
  x_grad = rows_form(cotangent, kernel, sizes, transpose=True)
  return x_grad.astype(x.dtype), kernel_form(x, cotangent, sizes).astype(kernel.dtype), None


_grouped.defvjp(_forward, _backward)


def _dot(x, y):
  return jnp.matmul(x, y, precision=_precision(x), preferred_element_type=jnp.float32)


def _precision(x):
  # By default float32 operands are one bfloat16 pass on a TPU, and TF32 on a GPU.
  return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _block_rows(rows: int, groups: int, most: int) -> int:
  """Returns how many rows to multiply at a time: a power of two near the average group's."""
  return min(most, 1 << max(rows // groups - 1, 0).bit_length(), max(rows, 1))


# CPU: loops over groups and blocks, whose trip counts are those of the data.


def _slice(x, start, size):
  """Returns x[start : start + size]; bfloat16 is sliced as bits.

  Workaround: the CPU code of XLA (jaxlib 0.10.2) otherwise converts the whole array to float32 before the loop.
  """
  found = jax.lax.dynamic_slice_in_dim(as_bits(x), start, size)
  return found if found.dtype == x.dtype else jax.lax.bitcast_convert_type(found, x.dtype)


def _each_group(sizes, carry: Any, body: Callable[[Any, Any, Any, Any], Any]) -> Any:
  """Runs carry = body(group, first row, end, carry) for every group that has rows, in ascending order."""
  ends = jnp.cumsum(sizes)
  filled = jnp.argsort(sizes == 0, stable=True)

  def one(i, carry):
    group = filled[i]
    return body(group, ends[group] - sizes[group], ends[group], carry)

  return jax.lax.fori_loop(0, jnp.sum(sizes > 0), one, carry)


def _each_block(first, end, block: int, rows: int, carry: Any, body: Callable[[Any, Any, Any], Any]) -> Any:
  """Runs carry = body(start, is_new, carry) for blocks of rows from `first` on, until `end`.

  The last block of all rows starts earlier, so as not to pass the end; is_new [block] tells which of its rows no block
  before it had.
  """

  def one(state):
    row, carry = state
    start = jnp.minimum(row, rows - block)
    return row + block, body(start, start + jnp.arange(block, dtype=jnp.int32) >= row, carry)

  return jax.lax.while_loop(lambda state: state[0] < end, one, (first, carry))[1]


def _cpu_rows(x, kernel, sizes, *, transpose):
  rows, width = x.shape[0], kernel.shape[1 if transpose else 2]
  block = _block_rows(rows, len(sizes), _CPU_BLOCK)

  def group(e, first, end, y):
    matrix = _slice(kernel, e, 1)[0].astype(x.dtype)

    def rows_of_block(start, is_new, y):
      product = _dot(_slice(x, start, block), matrix.T if transpose else matrix)
      # A block that passes the group's end writes into the next group, which overwrites it later.
      before = jax.lax.dynamic_slice_in_dim(y, start, block)
      return jax.lax.dynamic_update_slice_in_dim(y, jnp.where(is_new[:, None], product, before), start, 0)

    return _each_block(first, end, block, rows, y, rows_of_block)

  return _each_group(sizes, jnp.zeros((rows, width), jnp.float32), group)


def _cpu_kernel(x, y, sizes):
  rows = x.shape[0]
  block = _block_rows(rows, len(sizes), _CPU_BLOCK)
  shape = (x.shape[1], y.shape[1])

  def group(e, first, end, kernel):
    def rows_of_block(start, is_new, total):
      inside = (is_new & (start + jnp.arange(block, dtype=jnp.int32) < end))[:, None]
      one, other = (jnp.where(inside, _slice(z, start, block), 0) for z in (x, y))
      return total + _dot(transposed(one, left=True), other)

    total = _each_block(first, end, block, rows, jnp.zeros(shape, jnp.float32), rows_of_block)
    return jax.lax.dynamic_update_index_in_dim(kernel, total, e, 0)

  return _each_group(sizes, jnp.zeros((len(sizes), *shape), jnp.float32), group)


# GPU: batched products over blocks of rows, each with its group's matrix.


def _blocks(sizes, rows: int, block: int):
  """Divides every group into blocks of `block` rows.

  Returns:
    The group of each block, its rows [blocks, block], and the place in the blocks of every row. Places past the group's
    end have the number `rows`. The number of blocks is enough for any sizes, and a multiple of `_GPU_BATCH`.
  """
  count = -(-(rows // block + min(len(sizes), rows)) // _GPU_BATCH) * _GPU_BATCH
  ends, last = jnp.cumsum(sizes), jnp.cumsum(-(-sizes // block))
  starts, first = ends - sizes, last - -(-sizes // block)

  def group_at(ends, numbers):
    return jnp.minimum(jnp.searchsorted(ends, numbers, side="right"), len(sizes) - 1)

  numbers, every = jnp.arange(count, dtype=jnp.int32), jnp.arange(rows, dtype=jnp.int32)
  group, of_row = group_at(last, numbers), group_at(ends, every)
  found = (starts[group] + (numbers - first[group]) * block)[:, None] + jnp.arange(block, dtype=jnp.int32)[None]
  found = jnp.where(found < ends[group][:, None], found, rows)
  return group, found, first[of_row] * block + every - starts[of_row]


def _each_batch(x):
  return x.reshape(-1, _GPU_BATCH, *x.shape[1:])


def _gpu_rows(x, kernel, sizes, *, transpose):
  block = _block_rows(x.shape[0], len(sizes), _GPU_BLOCK)
  group, rows, place = _blocks(sizes, x.shape[0], block)

  def batch(_, xs):
    group, rows = xs
    taken = x.at[rows].get(mode="fill", fill_value=0)
    equation = "bmo,bio->bmi" if transpose else "bmi,bio->bmo"
    matrices = kernel[group].astype(x.dtype)
    return None, jnp.einsum(equation, taken, matrices, precision=_precision(x), preferred_element_type=jnp.float32)

  _, y = jax.lax.scan(batch, None, (_each_batch(group), _each_batch(rows)))
  return y.reshape(-1, y.shape[-1])[place]


def _gpu_kernel(x, y, sizes):
  block = _block_rows(x.shape[0], len(sizes), _GPU_BLOCK)
  group, rows, _ = _blocks(sizes, x.shape[0], block)

  def batch(kernel, xs):
    group, rows = xs
    one, other = (z.at[rows].get(mode="fill", fill_value=0) for z in (x, y))
    products = jnp.einsum("bmi,bmo->bio", one, other, precision=_precision(x), preferred_element_type=jnp.float32)
    return kernel.at[group].add(products, indices_are_sorted=True), None

  zero = jnp.zeros((len(sizes), x.shape[1], y.shape[1]), jnp.float32)
  return jax.lax.scan(batch, zero, (_each_batch(group), _each_batch(rows)))[0]


# TPU: the Pallas kernels of jax's megablox, which visit the tiles of each group.


def _round_up(x: int, unit: int) -> int:
  return -(-x // unit) * unit


def _tpu_tiles(rows: int, inner: int, width: int) -> tuple[int, int, int]:
  """Returns the tile sizes of rows, contracted and output dimension.

  A small tile of rows wastes little where a group ends. The whole contracted dimension in a tile means that a group's
  matrix is read once; an even number of output tiles gives both cores of a chip the same work.
  """
  m = min(_TPU_BLOCK, _round_up(rows, 16))
  for parts in (2, 4, 6, 8, 12, 16):
    n = min(_round_up(-(-width // parts), 128), width)
    if 2 * (m * inner + inner * n) * 4 + 3 * m * n * 4 <= _TPU_BYTES:
      return m, inner, n
  return m, 512, min(512, width)


@contextlib.contextmanager
def _megablox(dtype: Any) -> Iterator[None]:
  """Returns a context in which megablox (jax 0.10.2) is traced: it leaves precision and promotion to the context."""
  precision = jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default")
  with precision, jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def _tpu_rows(x, kernel, sizes, *, transpose):
  from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

  rows, inner, width = x.shape[0], x.shape[1], kernel.shape[1 if transpose else 2]
  tiles = _tpu_tiles(rows, inner, width)
  x = jnp.pad(x, ((0, -rows % tiles[0]), (0, 0)))
  if x.dtype == jnp.bfloat16:
    kernel = kernel.astype(x.dtype)
  with _megablox(x.dtype):
    return gmm(x, kernel, sizes, jnp.float32, tiles, transpose_rhs=transpose)[:rows]


def _tpu_kernel(x, y, sizes):
  from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

  m, _, n = _tpu_tiles(*x.shape, y.shape[1])
  tiles = m, min(512, x.shape[1]), n
  x, y = (jnp.pad(z, ((0, -z.shape[0] % m), (0, 0))) for z in (x, y))
  with _megablox(x.dtype):
    return tgmm(x.T, y, sizes, jnp.float32, tiles)


_FORMS = {"cpu": (_cpu_rows, _cpu_kernel), "gpu": (_gpu_rows, _gpu_kernel), "tpu": (_tpu_rows, _tpu_kernel)}
