import functools
import importlib
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.kernels import grouped_matmul as module
from distill.kernels.grouped_matmul import grouped_matmul, grouped_matmul_reference
from tests.kernels.precision import assert_equal_up_to_rounding

# Rows of each group, and rows after the last one.
SIZES = [([3, 0, 5, 70, 1], 0), ([200, 13, 0, 87], 11), ([1, 1, 0, 1], 2), ([0, 0, 0], 4), ([40], 0)]
BACKENDS = ["cpu", "gpu", "tpu"]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
  """Sets the platform that the kernel chooses its form by; those of a GPU and a TPU run on the CPU."""
  megablox = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
  for name in ("gmm", "tgmm"):
    monkeypatch.setattr(megablox, name, functools.partial(getattr(megablox, name), interpret=True))
  monkeypatch.setattr(module, "platform", lambda: request.param)
  return request.param


def operands(sizes, spare, *, inner=16, width=24):
  """Random rows, matrices and cotangents, float64; rows after the last group are NaN."""
  rng = np.random.default_rng(0)
  rows = sum(sizes) + spare
  x, kernel, cotangent = (rng.normal(size=one) for one in ((rows, inner), (len(sizes), inner, width), (rows, width)))
  x[sum(sizes) :], cotangent[sum(sizes) :] = np.nan, np.nan
  return x, kernel, cotangent


def value_and_pullback(function, x, kernel, cotangent, sizes):
  y, pull = jax.vjp(lambda x, kernel: function(x, kernel, sizes=sizes), x, kernel)
  return y, *pull(cotangent.astype(y.dtype))


@pytest.mark.parametrize("kernel_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("sizes", "spare"), SIZES)
def test_every_form_equals_the_definition_and_ignores_rows_after_the_last_group(
  backend, sizes, spare, dtype, kernel_dtype
):
  x, kernel, cotangent = operands(sizes, spare)
  rounded = [jnp.asarray(x, dtype), jnp.asarray(kernel, kernel_dtype), jnp.asarray(cotangent, dtype)]
  counts = jnp.asarray(sizes, jnp.int32)
  got = jax.jit(functools.partial(value_and_pullback, grouped_matmul))(*rounded, counts)
  assert [one.dtype for one in got] == [jnp.float32, dtype, kernel_dtype]
  with jax.enable_x64(True):
    rounded[1] = rounded[1].astype(dtype)
    wide = (jnp.asarray(np.nan_to_num(np.asarray(one, np.float64))) for one in rounded)
    expected = [np.asarray(one) for one in value_and_pullback(grouped_matmul_reference, *wide, counts)]
  rows = sum(sizes)
  dtypes = (jnp.float32, dtype, kernel_dtype)
  for one, other, held, length in zip(got, expected, dtypes, (rows, rows, len(sizes)), strict=True):
    if other[:length].size:
      bound = 24 if jnp.dtype(held) == jnp.float32 else 1.1
      assert_equal_up_to_rounding(one[:length], other[:length], roundings=bound, dtype=held)


@pytest.mark.parametrize("block", [1, 2, 64])
def test_blocks_of_any_size_on_a_cpu_give_the_same(monkeypatch, block):
  monkeypatch.setattr(module, "_CPU_BLOCK", block)
  x, kernel, cotangent = operands([5, 0, 8, 1, 2], 0)
  arguments = (
    *(jnp.asarray(one, jnp.float32) for one in (x, kernel, cotangent)),
    jnp.asarray([5, 0, 8, 1, 2], jnp.int32),
  )
  got, expected = (value_and_pullback(one, *arguments) for one in (grouped_matmul, grouped_matmul_reference))
  for one, other in zip(got, expected, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_float32_operands_are_multiplied_at_full_precision(backend):
  x, kernel, cotangent = (jnp.asarray(one, jnp.float32) for one in operands([30, 34], 0))
  jaxpr = str(
    jax.make_jaxpr(functools.partial(value_and_pullback, grouped_matmul))(
      x, kernel, cotangent, jnp.asarray([30, 34], jnp.int32)
    )
  )
  precisions = re.findall(r"dot_general\[.*?precision=(\S+)", jaxpr, re.DOTALL)
  assert len(precisions) >= 3 and all("HIGHEST" in one for one in precisions)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_tpu_all_products_are_kernels_that_read_each_matrix_once(monkeypatch, dtype):
  from jax.experimental import topologies

  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
  monkeypatch.setattr(module, "platform", lambda: "tpu")
  devices = topologies.get_topology_desc("v5p:2x2x1", "tpu").devices
  sharding = jax.sharding.SingleDeviceSharding(devices[0])
  shapes = ((2048, 2048), dtype), ((16, 2048, 768), "bfloat16"), ((2048, 768), dtype), ((16,), "int32")
  arguments = [jax.ShapeDtypeStruct(shape, held, sharding=sharding) for shape, held in shapes]
  traced = jax.jit(functools.partial(value_and_pullback, grouped_matmul)).trace(*arguments)
  text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 3
  assert " dot(" not in text and " convolution(" not in text
