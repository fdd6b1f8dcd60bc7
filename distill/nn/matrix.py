"""A matrix with sets of low-rank factors beside it, one of which acts: adapters that are applied, not merged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from distill.kernels.matmul import matmul_rows

Matrix = Float[Array | np.ndarray, "I O"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutedMatrix:
  """matrix * column[route] + a[route] @ b[route], never formed.

  Stands in the place of a `Linear`'s kernel or of an `Embedding`'s table.

  Attributes:
    matrix: The base's.
    a: One left factor a route.
    b: One right factor a route.
    column: Factor of each column a route, or None for ones (DoRA).
    route: Which of them acts.
  """

  matrix: Float[Array, "*L I O"]
  a: Float[Array, "*L N I R"]
  b: Float[Array, "*L N R O"]
  column: Float[Array, "*L N O"] | None
  route: Int[Array, "*L"]

  def project(self, x: Float[Array, "B I"]) -> Float[Array, "B O"]:
    """x through the matrix; operands in x's dtype, sums in float32."""
    low = jnp.matmul(x, self.a[self.route].astype(x.dtype), preferred_element_type=jnp.float32)
    return self._add(project(x, self.matrix), low.astype(x.dtype))

  def take(self, rows: Int[Array, "*B"]) -> Float[Array, "*B O"]:
    """Rows of the matrix, in float32."""
    return self._add(take(self.matrix, rows), jnp.take(self.a[self.route], rows, axis=0))

  def _add(self, y, low):
    if self.column is not None:
      y = y * self.column[self.route]
    return y + jnp.matmul(low, self.b[self.route].astype(low.dtype), preferred_element_type=jnp.float32)


def project(x: Float[Array, "B I"], matrix: Matrix | RoutedMatrix) -> Float[Array, "B O"]:
  """x @ matrix, with operands in x's dtype and a float32 sum."""
  if isinstance(matrix, RoutedMatrix):
    return matrix.project(x)
  return matmul_rows(x, jnp.asarray(matrix))


def take(matrix: Matrix | RoutedMatrix, rows: Int[Array, "*B"]) -> Float[Array, "*B O"]:
  """Rows of a matrix, in float32."""
  return matrix.take(rows) if isinstance(matrix, RoutedMatrix) else jnp.take(matrix, rows, axis=0).astype(jnp.float32)
