import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.axes.logical import use_mesh
from distill.kernels import attention as module
from distill.kernels.attention import attention, attention_reference
from distill.parallel.mesh import MeshConfig, make_mesh, replicated
from tests.kernels.precision import assert_equal_up_to_rounding, in_float64, segment_numbers, value_and_gradients


def operands(length, *, batch=2, keys=2, group=3, width=5):
  rng = np.random.default_rng(length)
  shapes = [(batch, keys, group, length, width), (batch, keys, length, width), (batch, keys, length, width)]
  return [rng.normal(size=shape).astype(np.float32) for shape in (*shapes, (keys, group))]


@pytest.mark.parametrize(
  ("length", "options"),
  [
    (1, {}),
    (4, {"window": 9}),
    (17, {}),
    (17, {"window": 5}),
    (17, {"window": 1, "softcap": 2.0}),
    (13, {"softcap": 2.0}),
  ],
)
@pytest.mark.parametrize("sinks", [False, True])
def test_attention_equals_its_definition_in_value_and_gradient(monkeypatch, length, options, sinks):
  monkeypatch.setattr(module, "_BLOCK_QUERIES", 4)
  *qkv, sink = operands(length)
  given = [*qkv, sink] if sinks else qkv
  segments = segment_numbers((2, length))

  def run(function):
    return lambda q, k, v, sinks=None: function(
      q, k, v, segments=jnp.asarray(segments), scale=0.4, sinks=sinks, **options
    )

  got = value_and_gradients(run(attention), *map(jnp.asarray, given))
  # The longest chain: a product over H, a softmax and a sum over S, and the same again on the way back.
  assert_equal_up_to_rounding(got, in_float64(run(attention_reference), *given), roundings=2 * (5 + 2 * length) + 20)


def test_attention_of_bfloat16_operands_is_exact_up_to_bfloat16_rounding(monkeypatch):
  monkeypatch.setattr(module, "_BLOCK_QUERIES", 4)
  given = [jnp.asarray(x, jnp.bfloat16) for x in operands(11)[:3]]
  segments = segment_numbers((2, 11))

  def run(function):
    return lambda q, k, v: function(q, k, v, segments=jnp.asarray(segments), scale=0.4)

  got = value_and_gradients(run(attention), *given)
  # Weights, cotangents, their products and the results are rounded once each.
  assert_equal_up_to_rounding(got, in_float64(run(attention_reference), *given), roundings=6, dtype=jnp.bfloat16)


def test_attention_cuts_long_rows_into_few_blocks_that_cover_every_query():
  for length in (1, 128, 129, 1024, 1025, 5000):
    blocks = list(module._blocks(length, 100))
    assert len(blocks) <= 8
    assert [i for block in blocks for i in range(block.start, block.stop)] == list(range(length))
    assert all(block.first_key == max(0, block.start - 99) for block in blocks)


@pytest.mark.parametrize("sinks", [False, True])
def test_on_an_accelerator_each_device_computes_its_own_rows_and_heads(monkeypatch, sinks):
  monkeypatch.setattr(module, "platform", lambda: "gpu")
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  given = operands(17, batch=4)[: 4 if sinks else 3]
  segments = jnp.asarray(segment_numbers((4, 17)))
  options = {"segments": segments, "scale": 0.4, "window": 5}

  def run(*arguments):
    with use_mesh(mesh):
      return attention(*arguments[:3], sinks=arguments[3] if sinks else None, **options)

  got = value_and_gradients(run, *(jax.device_put(x, replicated(mesh)) for x in given))
  assert got[0].sharding.shard_shape(got[0].shape) == (1, 1, 3, 17, 5)
  expected = in_float64(
    lambda *arguments: attention_reference(*arguments[:3], sinks=arguments[3] if sinks else None, **options), *given
  )
  assert_equal_up_to_rounding(got, expected, roundings=100)
