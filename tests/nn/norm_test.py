import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.nn.norm import LayerNorm, RMSNorm
from distill.nn.param import Init
from tests.kernels.precision import assert_equal_up_to_rounding

X = 7.0 * np.random.default_rng(0).normal(size=(4, 12)) + 1.0


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_fresh_rms_norm_gives_every_group_a_root_mean_square_of_one(offset, groups):
  norm = RMSNorm(Init(jax.random.key(0)), width=12, eps=1e-9, offset=offset, groups=groups)
  y = np.asarray(norm(jnp.asarray(X, jnp.float32)), np.float64).reshape(4, groups, -1)
  assert_equal_up_to_rounding(np.sqrt(np.mean(y**2, axis=-1)), np.ones((4, groups)), roundings=4 * 12)


def test_the_stored_scale_of_an_rms_norm_is_a_difference_from_its_offset():
  norm, shifted = (RMSNorm(Init(jax.random.key(0)), width=12, eps=1e-6, offset=offset) for offset in (0.0, 1.0))
  norm.scale[...], shifted.scale[...] = jnp.full(12, 1.5), jnp.full(12, 0.5)
  x = jnp.asarray(X, jnp.bfloat16)
  np.testing.assert_array_equal(norm(x), shifted(x))
  assert norm(x).dtype == jnp.bfloat16


def test_a_layer_norm_removes_the_mean_and_adds_its_bias():
  norm = LayerNorm(Init(jax.random.key(0)), width=12, eps=1e-3)
  norm.scale[...], norm.bias[...] = 2.0 * jnp.ones(12), jnp.arange(12.0)
  centred = X - X.mean(axis=-1, keepdims=True)
  expected = 2.0 * centred / np.sqrt(X.var(axis=-1, keepdims=True) + 1e-3) + np.arange(12.0)
  assert_equal_up_to_rounding(norm(jnp.asarray(X, jnp.float32)), expected, roundings=4 * 12)
