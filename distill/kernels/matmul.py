"""Matrix products with float32 sums, the operation behind every projection."""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

_HALVES = 2


@jax.custom_vjp
def matmul(x: Float[Array, "*B I"], matrix: Float[Array, "I O"]) -> Float[Array, "*B O"]:
  """Computes x @ matrix with operands in x's dtype and float32 sums, in the forward and the backward pass.

  The backward pass rounds the cotangent to x's dtype before it multiplies. A float32 cotangent would turn bfloat16
  products into float32 ones, which are slower.

  Returns:
    The product, float32. The gradient of `matrix` is summed in float32 and has the dtype of `matrix`.
  """
  return jnp.matmul(x, matrix.astype(x.dtype), preferred_element_type=jnp.float32)


def matmul_reference(x: Float[Array, "*B I"], matrix: Float[Array, "I O"]) -> Float[Array, "*B O"]:
  """Computes `matmul` and `matmul_rows` by their definition, in the dtype of the operands."""
  return jnp.einsum("...i,io->...o", x, matrix)


def _forward(x, matrix):
  return matmul(x, matrix), (x, matrix)


def _backward(saved, cotangent):
  x, matrix = saved
  cotangent = cotangent.astype(x.dtype)
  x_grad = jnp.matmul(cotangent, transposed(matrix.astype(x.dtype)), preferred_element_type=jnp.float32)
  # Flattened to two dimensions: the CPU code of XLA (jaxlib 0.10.2) takes 2.5 times as long for [B, T, I].
  rows, row_grads = (y.reshape(-1, y.shape[-1]) for y in (x, cotangent))
  matrix_grad = jnp.matmul(transposed(rows, left=True), row_grads, preferred_element_type=jnp.float32)
  return x_grad.astype(x.dtype), matrix_grad.astype(matrix.dtype)


matmul.defvjp(_forward, _backward)


def matmul_rows(x: Float[Array, "M I"], matrix: Float[Array, "I O"]) -> Float[Array, "M O"]:
  """Computes `matmul` for rows [M, I]; a single row, as in decoding, is summed in two halves in parallel on a CPU.

  Workaround: the CPU code of XLA (jaxlib 0.10.2) multiplies a single row on one core, but a batch of two products on
  two. With two cores and a matrix of 63 MB the split takes 1.55 instead of 2.85 ms.
  """
  if x.shape[0] == 1 and x.shape[1] % _HALVES == 0:
    return jax.lax.platform_dependent(x, matrix.astype(x.dtype), cpu=_in_halves, default=matmul)
  return matmul(x, jnp.asarray(matrix))


def _in_halves(x, matrix):
  parts = x.reshape(_HALVES, 1, -1), matrix.reshape(_HALVES, -1, matrix.shape[1])
  return jnp.sum(jnp.matmul(*parts, preferred_element_type=jnp.float32), axis=0)


def transposed(matrix: Float[Array, "I O"], *, left: bool = False) -> Float[Array, "O I"]:
  """Returns the transpose, to be used as an operand of a matmul; it is materialised where that is faster on a CPU.

  Workaround: the CPU code of XLA (jaxlib 0.10.2) would otherwise transpose inside the matmul. It converts bfloat16
  operands to float32 for that, at half the speed (180 instead of 350 GFLOP/s on two cores), and loses 15 % on float32
  operands on the left. On several devices the transpose is never materialised.

  Args:
    matrix: The matrix to transpose.
    left: True if the transpose will be the left operand of the matmul, False if the right one.
  """
  # XLA does not partition an array of fixed layout: every device would receive the whole matrix.
  if jax.device_count() > 1 or (matrix.dtype == jnp.float32 and not left):
    return matrix.T
  return jax.lax.platform_dependent(matrix, cpu=_materialised, default=jnp.transpose)


def _materialised(matrix):
  return with_layout_constraint(matrix.T, Layout(major_to_minor=(0, 1)))
