import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.kernels import head_gradient as module
from distill.kernels.head_gradient import add_head_gradient, add_head_gradient_reference
from tests.kernels.precision import assert_equal_up_to_rounding


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("vocab", [5, 128, 400, 401, 1030])
def test_head_gradient_equals_its_definition_for_any_number_of_columns(monkeypatch, vocab, dtype):
  monkeypatch.setattr(module, "_BLOCK_BYTES", 1)  # Blocks of the fewest columns.
  rng = np.random.default_rng(0)
  total, hidden, grad = (rng.normal(size=shape).astype(np.float32) for shape in ((6, vocab), (7, 6), (7, vocab)))
  hidden, total = jnp.asarray(hidden, dtype), jnp.asarray(total)
  got = jax.jit(lambda *given: add_head_gradient(*given))(total, hidden, jnp.asarray(grad))
  with jax.enable_x64(True):
    # The definition takes the operands as they are after rounding.
    wide = (jnp.asarray(np.asarray(one.astype(dtype), np.float64)) for one in (hidden, jnp.asarray(grad)))
    expected = np.asarray(add_head_gradient_reference(jnp.asarray(np.float64(total)), *wide))
  assert_equal_up_to_rounding(got, expected, roundings=8)
