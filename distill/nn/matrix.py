"""Weights behind one interface, `Matrix`: layers use a dense kernel and one with unmerged adapters in the same way."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from distill.kernels.matmul import matmul_rows

ArrayLike = jax.Array | np.ndarray


@runtime_checkable
class Matrix(Protocol):
  """A weight of shape [I, O], the kernel of a `Linear` or the table of an `Embedding`, however it is stored.

  An implementation is a pytree, so that it can take the place of a parameter's array.
  """

  def project(self, x: Float[Array, "M I"]) -> Float[Array, "M O"]:
    """Computes x @ matrix with operands in x's dtype and float32 sums."""

  def take(self, rows: Int[Array, "*B"]) -> Float[Array, "*B O"]:
    """Returns the rows of the matrix with the indices `rows`, in float32."""


@dataclasses.dataclass(frozen=True)
class DenseMatrix:
  """A matrix that is stored as one array."""

  value: Float[Array | np.ndarray, "I O"]

  def project(self, x: Float[Array, "M I"]) -> Float[Array, "M O"]:
    """Computes x @ self.value with operands in x's dtype and float32 sums."""
    return matmul_rows(x, jnp.asarray(self.value))

  def take(self, rows: Int[Array, "*B"]) -> Float[Array, "*B O"]:
    """Returns the rows of the array with the indices `rows`, in float32."""
    return jnp.take(self.value, rows, axis=0).astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutedMatrix:
  """A weight with unmerged adapters: matrix * column[route] + a[route] @ b[route], used without forming this sum.

  A route is one set of adapters. Stacked layers add a leading dimension L to all arrays; the methods need the
  arrays of one layer, without L.

  Attributes:
    matrix: Weight of the base model.
    a: Left low-rank factor of each route.
    b: Right low-rank factor of each route.
    column: For each route, the factors of the output columns (DoRA); None if all factors are one.
    route: Index of the route that is applied, the same for all layers.
  """

  matrix: Float[Array, "*L I O"]
  a: Float[Array, "*L routes I R"]
  b: Float[Array, "*L routes R O"]
  column: Float[Array, "*L routes O"] | None
  route: Int[Array, "*L"]

  def project(self, x: Float[Array, "M I"]) -> Float[Array, "M O"]:
    """Computes x @ (matrix * column[route] + a[route] @ b[route]) with operands in x's dtype and float32 sums."""
    low = jnp.matmul(x, self.a[self.route].astype(x.dtype), preferred_element_type=jnp.float32)
    return self._add(DenseMatrix(self.matrix).project(x), low.astype(x.dtype))

  def take(self, rows: Int[Array, "*B"]) -> Float[Array, "*B O"]:
    """Returns the rows with the indices `rows` of the weight with this route's adapters (see the class), in float32."""
    return self._add(DenseMatrix(self.matrix).take(rows), jnp.take(self.a[self.route], rows, axis=0))

  def _add(self, y, low):
    if self.column is not None:
      y = y * jnp.broadcast_to(self.column[self.route], y.shape)
    return y + jnp.matmul(low, self.b[self.route].astype(low.dtype), preferred_element_type=jnp.float32)


def as_matrix(value: Matrix | ArrayLike) -> Matrix:
  """Wraps an array in a `DenseMatrix`; returns a value that already is a `Matrix` as it is."""
  return DenseMatrix(value) if isinstance(value, ArrayLike) else value
