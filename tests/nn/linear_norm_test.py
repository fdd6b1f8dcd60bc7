import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.nn.linear import PROJECTION, Linear
from distill.nn.norm import RMSNorm
from distill.nn.param import Init, normal


@pytest.mark.parametrize("rows", [(2, 3), (1,)])
def test_linear_equals_float64(rows):
  linear = Linear(Init(jax.random.key(0)), shape=(16, 5), axes=("embed", "mlp"), use_bias=True)
  linear.bias[...] = jnp.arange(5.0)
  x = np.random.default_rng(0).normal(size=(*rows, 16))
  expected = x @ np.asarray(linear.kernel[...], np.float64) + np.arange(5.0)
  np.testing.assert_allclose(linear(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_fresh_norm_has_unit_rms(offset):
  norm = RMSNorm(Init(jax.random.key(0)), width=64, eps=1e-6, offset=offset)
  y = norm(7.0 * jax.random.normal(jax.random.key(1), (4, 64)))
  np.testing.assert_allclose(jnp.sqrt(jnp.mean(y**2, -1)), 1.0, rtol=1e-5)


def test_a_parameter_depends_on_its_name_only_and_repeats_stack():
  init = Init(jax.random.key(0)).child("mlp")
  one = init.param("up", shape=(4, 3), axes=("embed", "mlp"), init=normal(1.0))
  init.param("down", shape=(3, 4), axes=("mlp", "embed"), init=normal(1.0))
  again = init.param("up", shape=(4, 3), axes=("embed", "mlp"), init=normal(1.0))
  assert (one[...] == again[...]).all()
  stacked = (
    Init(jax.random.key(0), repeats=3).child("mlp").param("up", shape=(4, 3), axes=("embed", "mlp"), init=normal(1.0))
  )
  assert stacked[...].shape == (3, 4, 3)
  assert not (stacked[...][0] == stacked[...][1]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_projection_gave_is_kept_once_and_found_again(dtype):
  linear = Linear(Init(jax.random.key(0)), shape=(6, 8), axes=("embed", "mlp"))
  x = jax.random.normal(jax.random.key(1), (2, 3, 6)).astype(dtype)

  def loss(x):
    return jnp.sum(jnp.sin(linear(x).astype(jnp.float32)))

  kept = jax.checkpoint(loss, policy=jax.checkpoint_policies.save_only_these_names(PROJECTION))
  np.testing.assert_array_equal(jax.grad(kept)(x), jax.grad(loss)(x))
  saved = [leaf for leaf in jax.tree.leaves(jax.vjp(kept, x)[1]) if leaf.shape == (2, 3, 8)]
  assert [leaf.dtype.itemsize for leaf in saved] == [x.dtype.itemsize]
