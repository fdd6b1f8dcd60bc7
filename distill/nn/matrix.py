"""A matrix with sets of low-rank factors beside it, one of which acts: adapters that are applied, not merged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from distill.kernels.matmul import matmul

_HALVES = 2

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
  if x.shape[0] == 1 and x.shape[1] % _HALVES == 0:
    return jax.lax.platform_dependent(x, matrix.astype(x.dtype), cpu=_in_halves, default=matmul)
  return matmul(x, jnp.asarray(matrix))


def _in_halves(x, matrix):
  """The product of a single row, as decoding has it: 1.55 in place of 2.85 ms for 63 MB.

  XLA's CPU code for one row keeps one core busy, for a batch of two products both.
  """
  parts = x.reshape(_HALVES, 1, -1), matrix.reshape(_HALVES, -1, matrix.shape[1])
  return jnp.sum(jnp.matmul(*parts, preferred_element_type=jnp.float32), axis=0)


def take(matrix: Matrix | RoutedMatrix, rows: Int[Array, "*B"]) -> Float[Array, "*B O"]:
  """Rows of a matrix, in float32."""
  return matrix.take(rows) if isinstance(matrix, RoutedMatrix) else jnp.take(matrix, rows, axis=0).astype(jnp.float32)
