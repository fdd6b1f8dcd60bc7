import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.nn.linear import PROJECTION, Linear
from distill.nn.param import Init
from tests.kernels.precision import assert_equal_up_to_rounding


@pytest.mark.parametrize("rows", [(2, 3), (1,)])
def test_linear_equals_the_float64_matmul(rows):
  linear = Linear(Init(jax.random.key(0)), shape=(16, 5), axes=("embed", "mlp"), use_bias=True)
  linear.bias[...] = jnp.arange(5.0)
  x = np.random.default_rng(0).normal(size=(*rows, 16))
  expected = x @ np.asarray(linear.kernel[...], np.float64) + np.arange(5.0)
  assert_equal_up_to_rounding(linear(jnp.asarray(x, jnp.float32)), expected, roundings=4 * 17)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_remat_saves_the_output_of_a_linear_projection_once_and_in_its_own_dtype(dtype):
  linear = Linear(Init(jax.random.key(0)), shape=(6, 8), axes=("embed", "mlp"))
  x = jax.random.normal(jax.random.key(1), (2, 3, 6)).astype(dtype)

  def loss(x):
    return jnp.sum(jnp.sin(linear(x).astype(jnp.float32)))

  remat = jax.checkpoint(loss, policy=jax.checkpoint_policies.save_only_these_names(PROJECTION))
  np.testing.assert_array_equal(jax.grad(remat)(x), jax.grad(loss)(x))
  saved = [leaf for leaf in jax.tree.leaves(jax.vjp(remat, x)[1]) if leaf.shape == (2, 3, 8)]
  assert [leaf.dtype.itemsize for leaf in saved] == [x.dtype.itemsize]
