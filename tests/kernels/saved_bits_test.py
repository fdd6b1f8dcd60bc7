import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.kernels.saved_bits import as_bits, saved_as_bits, saved_as_bits_reference
from tests.kernels.precision import value_and_gradients


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_as_bits_changes_neither_the_value_nor_its_gradient(dtype):
  x = jnp.asarray([0.0, -0.0, 1.5, -3.25e8, 7e-30], dtype)
  got, expected = (
    value_and_gradients(lambda x, f=f: jnp.sin(f(x, "name")), x) for f in (saved_as_bits, saved_as_bits_reference)
  )
  jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize(("dtype", "bits"), [("float32", "float32"), ("bfloat16", "uint16")])
def test_a_remat_policy_saves_a_tagged_value_once_and_a_bfloat16_one_as_bits(dtype, bits):
  def loss(x):
    return jnp.sum(jnp.sin(saved_as_bits(2 * jnp.cos(x), "name").astype(jnp.float32)))

  policy = jax.checkpoint_policies.save_only_these_names("name")
  _, pull = jax.vjp(jax.checkpoint(loss, policy=policy), jnp.ones((3, 4), dtype))
  saved = [leaf.dtype.name for leaf in jax.tree.leaves(pull) if leaf.shape == (3, 4)]
  assert sorted(saved) == sorted([bits, dtype])  # And the argument.
  assert as_bits(jnp.ones(2, dtype)).dtype == bits
