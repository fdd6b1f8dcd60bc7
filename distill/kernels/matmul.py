"""The product that every projection is."""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float


@jax.custom_vjp
def matmul(x: Float[Array, "*B I"], matrix: Float[Array, "I O"]) -> Float[Array, "*B O"]:
  """x @ matrix with operands in x's dtype and a float32 sum, backwards as forwards.

  What flows back is rounded to x's dtype before it is multiplied: left in float32, one operand would be wide and one
  narrow, and the products of the backward pass as slow as float32 ones. The gradient of the matrix is a float32 sum in
  the matrix's own dtype.
  """
  return jnp.matmul(x, matrix.astype(x.dtype), preferred_element_type=jnp.float32)


def _forward(x, matrix):
  return matmul(x, matrix), (x, matrix)


def _backward(saved, cotangent):
  x, matrix = saved
  cotangent = cotangent.astype(x.dtype)
  of_x = jnp.matmul(cotangent, transposed(matrix.astype(x.dtype)), preferred_element_type=jnp.float32)
  # Rows as one dimension: XLA's CPU code for [B, T, I] takes 2.5 times as long.
  rows, of_rows = (y.reshape(-1, y.shape[-1]) for y in (x, cotangent))
  of_matrix = jnp.matmul(transposed(rows, left=True), of_rows, preferred_element_type=jnp.float32)
  return of_x.astype(x.dtype), of_matrix.astype(matrix.dtype)


matmul.defvjp(_forward, _backward)


def transposed(matrix: Float[Array, "I O"], *, left: bool = False) -> Float[Array, "O I"]:
  """The transpose as an operand of a product, its left one or its right; written out where a CPU multiplies faster.

  Else XLA's CPU code transposes within the product: narrow operands become float32 ones then, half as fast (180 in
  place of 350 GFLOP/s, two cores), and float32 ones on the left lose 15 %. Of several devices none gets it written out.
  """
  # What fixes a layout is not partitioned: all of the matrix would come to every device.
  if jax.device_count() > 1 or (matrix.dtype == jnp.float32 and not left):
    return matrix.T
  return jax.lax.platform_dependent(matrix, cpu=_written_out, default=jnp.transpose)


def _written_out(matrix):
  return with_layout_constraint(matrix.T, Layout(major_to_minor=(0, 1)))
