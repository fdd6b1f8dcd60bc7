import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.nn.matrix import DenseMatrix, RoutedMatrix, as_matrix


def routed(route, column):
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = (6, 5), (3, 6, 2), (3, 2, 5), (3, 5)
  matrix, a, b, columns = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
  return RoutedMatrix(matrix=matrix, a=a, b=b, column=columns if column else None, route=jnp.asarray(route))


@pytest.mark.parametrize("column", [True, False])
def test_a_routed_matrix_equals_the_dense_matrix_with_its_route_merged(column):
  for route in (0, 2):
    found = as_matrix(routed(route, column))
    scale = found.column[route] if column else 1.0
    merged = as_matrix(found.matrix * jnp.broadcast_to(scale, found.matrix.shape) + found.a[route] @ found.b[route])
    assert isinstance(merged, DenseMatrix)
    x, rows = jax.random.normal(jax.random.key(1), (4, 6)), jnp.asarray([[5, 0], [3, 3]])
    np.testing.assert_allclose(found.project(x), merged.project(x), atol=1e-5)
    np.testing.assert_allclose(found.take(rows), merged.take(rows), atol=1e-5)


def test_a_bfloat16_matrix_gives_float32_products_and_float32_rows():
  kernel = jax.random.normal(jax.random.key(0), (6, 5)).astype(jnp.bfloat16)
  x = jax.random.normal(jax.random.key(1), (4, 6)).astype(jnp.bfloat16)
  y = as_matrix(kernel).project(x)
  assert y.dtype == as_matrix(kernel).take(jnp.asarray([1])).dtype == jnp.float32
  np.testing.assert_allclose(y, np.asarray(x, np.float64) @ np.asarray(kernel, np.float64), atol=1e-5)
