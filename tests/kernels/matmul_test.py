import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.kernels.matmul import matmul, matmul_reference, matmul_rows, transposed
from tests.kernels.precision import assert_equal_up_to_rounding


@pytest.fixture
def one_device(monkeypatch):
  """Sets the number of devices to one, as on a user's CPU; tests otherwise have eight."""
  monkeypatch.setattr(jax, "device_count", lambda: 1)


def operands(dtype, *, lead=(2, 5), inner=16, out=8):
  rng = np.random.default_rng(0)
  x, matrix, cotangent = (rng.normal(size=shape) for shape in ((*lead, inner), (inner, out), (*lead, out)))
  return jnp.asarray(x, dtype), jnp.asarray(matrix, jnp.float32), jnp.asarray(cotangent, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
  ("function", "lead", "inner"), [(matmul, (2, 5), 16), (matmul_rows, (1,), 16), (matmul_rows, (1,), 7)]
)
def test_matmul_equals_its_definition_in_value_and_gradient(monkeypatch, function, lead, inner, dtype, devices):
  monkeypatch.setattr(jax, "device_count", lambda: devices)
  x, matrix, cotangent = operands(dtype, lead=lead, inner=inner)
  # A new lambda each time: a jitted function that was traced is not traced again for another number of devices.
  y, pull = jax.vjp(jax.jit(lambda x, matrix: function(x, matrix)), x, matrix)
  x_grad, matrix_grad = pull(cotangent.astype(y.dtype))
  assert y.dtype == jnp.float32 and x_grad.dtype == dtype and matrix_grad.dtype == jnp.float32
  with jax.enable_x64(True):
    # The definition takes the operands as they are after rounding.
    x, matrix, cotangent = (jnp.asarray(np.asarray(one.astype(dtype), np.float64)) for one in (x, matrix, cotangent))
    expected, pull = jax.vjp(matmul_reference, x, matrix)
    expected, expected_grads = np.asarray(expected), [np.asarray(one) for one in pull(cotangent)]
  # Sums are float32 whatever the operands are; only the gradient of x is rounded to their dtype.
  assert_equal_up_to_rounding(y, expected, roundings=inner)
  assert_equal_up_to_rounding(x_grad, expected_grads[0], roundings=8 if dtype == "float32" else 1.1, dtype=dtype)
  if inner == 16 and lead == (1,):
    # A single row casts the matrix before it chooses between platforms, and its gradient with it.
    assert_equal_up_to_rounding(matrix_grad, expected_grads[1], roundings=1.1, dtype=dtype)
  else:
    assert_equal_up_to_rounding(matrix_grad, expected_grads[1], roundings=10)


def test_gradient_matmuls_on_a_cpu_have_the_operand_dtypes_of_the_forward_pass(one_device):
  x, matrix, cotangent = operands("bfloat16")

  def gradients(x, matrix, cotangent):
    return jax.vjp(matmul, x, matrix)[1](cotangent.astype(jnp.float32))

  forwards, backwards = dot_dtypes(matmul, x, matrix), dot_dtypes(gradients, x, matrix, cotangent)
  assert len(forwards) == 2 and backwards == forwards * 2


def dot_dtypes(function, *args):
  """Returns the dtypes of the operands of all matmuls in the compiled function."""
  text = jax.jit(function).lower(*args).compile().as_text()
  dtypes = dict(re.findall(r"(%[\w.\-]+) = (\w+)\[", text))
  return [dtypes[name] for pair in re.findall(r" dot\((%[\w.\-]+), (%[\w.\-]+)\)", text) for name in pair]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("left", [False, True])
def test_a_materialised_transpose_equals_the_plain_transpose(one_device, dtype, left):
  matrices = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 6)), dtype)
  run = jax.jit(jax.vmap(lambda x: transposed(x, left=left)))
  np.testing.assert_array_equal(run(matrices), matrices.swapaxes(1, 2))
