import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.kernels.matmul import matmul, transposed


@pytest.fixture
def one_device(monkeypatch):
  """What a user's CPU is; tests have eight."""
  monkeypatch.setattr(jax, "device_count", lambda: 1)


def given(dtype):
  x, matrix, cotangent = (
    np.random.default_rng(seed).normal(size=shape) for seed, shape in enumerate([(2, 5, 16), (16, 8), (2, 5, 8)])
  )
  return jnp.asarray(x, dtype), jnp.asarray(matrix, jnp.float32), jnp.asarray(cotangent, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("devices", [1, 8])
def test_gradients_are_those_of_float64(monkeypatch, dtype, devices):
  monkeypatch.setattr(jax, "device_count", lambda: devices)
  x, matrix, cotangent = given(dtype)
  # A function of its own: one that was traced is not traced again for other devices.
  y, pull = jax.vjp(jax.jit(lambda x, matrix: matmul(x, matrix)), x, matrix)
  of_x, of_matrix = pull(cotangent.astype(y.dtype))
  x, cotangent, rounded = (np.asarray(a, np.float64) for a in (x, cotangent, matrix.astype(dtype)))
  np.testing.assert_allclose(y, x @ rounded, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(
    np.asarray(of_x, np.float64), cotangent @ rounded.T, rtol=1e-2 if dtype != "float32" else 1e-5, atol=1e-5
  )
  np.testing.assert_allclose(of_matrix, np.einsum("bti,bto->io", x, cotangent), rtol=1e-5, atol=1e-5)


def test_a_cpu_multiplies_narrow_operands_backwards_as_forwards(one_device):
  x, matrix, cotangent = given("bfloat16")

  def gradients(x, matrix, cotangent):
    return jax.vjp(matmul, x, matrix)[1](cotangent.astype(jnp.float32))

  forwards, backwards = operands(matmul, x, matrix), operands(gradients, x, matrix, cotangent)
  assert len(forwards) == 2 and backwards == forwards * 2


def operands(function, *args):
  """Dtypes of what the compiled products take."""
  text = jax.jit(function).lower(*args).compile().as_text()
  dtypes = dict(re.findall(r"(%[\w.\-]+) = (\w+)\[", text))
  return [dtypes[name] for pair in re.findall(r" dot\((%[\w.\-]+), (%[\w.\-]+)\)", text) for name in pair]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("left", [False, True])
def test_a_transpose_written_out_is_the_transpose(one_device, dtype, left):
  matrices = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 6)), dtype)
  run = jax.jit(jax.vmap(lambda x: transposed(x, left=left)))
  np.testing.assert_array_equal(run(matrices), matrices.swapaxes(1, 2))
