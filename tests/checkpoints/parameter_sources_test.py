"""Canonical parameters are read block by block from tensors that are transposed, fused or split."""

import math
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.checkpoints.name_table import Part, TensorEntry, checkpoint
from distill.checkpoints.parameter_sources import parameter_sources, tensors_to_write
from distill.checkpoints.tensor_source import TensorInfo
from distill.errors import InputError

TABLE = (
  TensorEntry("plain", "a.plain"),
  TensorEntry("flipped", "a.flipped", "transpose"),
  TensorEntry("conv", "a.conv", "conv"),
  TensorEntry("q", "a.qkv", "transpose", Part(0, 6)),
  TensorEntry("k", "a.qkv", "transpose", Part(6, 10)),
  TensorEntry("gate", "a.both", "copy", Part(0, 1, 2)),
  TensorEntry("up", "a.both", "copy", Part(1, 2, 2)),
  TensorEntry("conv_a", "a.convs", "conv", Part(0, 4)),
  TensorEntry("conv_b", "a.convs", "conv", Part(4, 7)),
  TensorEntry("keys", "a.grouped", "transpose", Part(0, 2, 7)),
  TensorEntry("values", "a.grouped", "transpose", Part(2, 5, 7)),
  TensorEntry("gates", "a.grouped", "transpose", Part(5, 7, 7)),
  *(TensorEntry("experts", f"a.experts.{i}", "transpose", expert=i) for i in (1, 0, 2)),
)
SHAPES = {
  "plain": (7,),
  "flipped": (5, 9),
  "conv": (4, 6),
  "q": (3, 6),
  "k": (3, 4),
  "gate": (2, 5, 4),
  "up": (2, 5, 4),
  "conv_a": (3, 4),
  "conv_b": (3, 3),
  "keys": (4, 6),
  "values": (4, 9),
  "gates": (4, 6),
  "experts": (3, 4, 5),
}
RNG = np.random.default_rng(0)
PARAMS = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


class DictSource:
  """A `TensorSource` of tensors in memory, which counts what is read."""

  def __init__(self, tensors):
    self.values, self.read_bytes = tensors, 0

  def tensors(self):
    return {
      name: TensorInfo(name=name, dtype=x.dtype, shape=x.shape, path=pathlib.Path("memory"))
      for name, x in self.values.items()
    }

  def read(self, name, *, index):
    value = self.values[name][index]
    self.read_bytes += value.nbytes
    return value


def opened(tensors):
  source = DictSource(tensors)
  return source, parameter_sources(TABLE, tensors=source, infos=source.tensors(), shapes=SHAPES, where="here")


def test_tensors_made_only_when_written_equal_those_made_at_once():
  made = tensors_to_write(TABLE, params=PARAMS)
  expected = checkpoint(TABLE, params=PARAMS)
  assert set(made) == set(expected)
  for name, value in expected.items():
    assert (made[name].shape, made[name].dtype) == (value.shape, value.dtype)
    np.testing.assert_array_equal(made[name].make(), value)


@given(data=st.data(), name=st.sampled_from(sorted(SHAPES)))
def test_a_block_of_a_parameter_is_read_without_the_rest(data, name):
  tensors, sources = opened(checkpoint(TABLE, params=PARAMS))
  source = sources[name]
  bounds = [sorted(data.draw(st.sets(st.integers(0, size), min_size=2, max_size=2))) for size in SHAPES[name]]
  block = tuple(slice(*pair) for pair in bounds)
  np.testing.assert_array_equal(source.read(index=block), PARAMS[name][block])
  assert tensors.read_bytes == 4 * math.prod(stop - start for start, stop in bounds)
  chunks = list(source.chunks(block, size=data.draw(st.integers(1, 100))))
  found = np.full(SHAPES[name], np.nan, np.float32)
  for chunk in chunks:
    found[chunk] = source.read(index=chunk)
  assert sum(math.prod(one.stop - one.start for one in chunk) for chunk in chunks) == PARAMS[name][block].size
  np.testing.assert_array_equal(found[block], PARAMS[name][block])


@pytest.mark.parametrize(
  "tensor, shape",
  [
    ("a.plain", (8,)),
    ("a.plain", ()),
    ("a.qkv", (11, 3)),
    ("a.qkv", ()),
    ("a.grouped", (22, 4)),
    ("a.grouped", (28, 4)),
    ("a.grouped", (7,)),
    ("a.experts.1", (5, 5)),
  ],
)
def test_a_tensor_of_another_shape_than_config_json_gives_is_refused_before_it_is_read(tensor, shape):
  with pytest.raises(InputError, match=f"here: {tensor} has shape"):
    opened({**checkpoint(TABLE, params=PARAMS), tensor: np.zeros(shape, np.float32)})


def test_a_tensor_of_integers_is_refused_before_it_is_read():
  with pytest.raises(InputError, match=r"here: a\.plain is stored as int8; give weights that are not quantised"):
    opened({**checkpoint(TABLE, params=PARAMS), "a.plain": np.zeros(7, np.int8)})


def test_a_stored_nan_is_refused_when_the_parameter_is_read():
  _, sources = opened({**checkpoint(TABLE, params=PARAMS), "a.plain": np.full(7, np.nan, np.float32)})
  with pytest.raises(InputError, match=r"memory: tensor a\.plain holds values that are not finite"):
    sources["plain"].read()
