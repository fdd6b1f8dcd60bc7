"""Any block of a parameter, however a checkpoint keeps it, is read alone and is what the whole would have given."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.checkpoints.name_table import Part, TensorEntry, checkpoint
from distill.checkpoints.tensor_sources import pending, sources
from distill.errors import InputError
from distill.files import safetensors_files
from distill.files.tensors import Reader

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


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  directory = tmp_path_factory.mktemp("written")
  safetensors_files.write(directory, pending(TABLE, params=PARAMS), stem="model")
  return directory, safetensors_files.stored(directory, stem="model")


def test_what_is_written_tensor_by_tensor_is_the_table_applied_at_once(written):
  tensors = safetensors_files.read(written[0], stem="model")
  for name, expected in checkpoint(TABLE, params=PARAMS).items():
    np.testing.assert_array_equal(tensors[name], expected)


@given(data=st.data(), name=st.sampled_from(sorted(SHAPES)))
def test_a_block_is_read_alone(written, data, name):
  source = sources(TABLE, stored=written[1], shapes=SHAPES, where="here")[name]
  bounds = [sorted(data.draw(st.sets(st.integers(0, size), min_size=2, max_size=2))) for size in SHAPES[name]]
  block = tuple(slice(*pair) for pair in bounds)
  chunks = list(source.chunks(block, size=data.draw(st.integers(1, 100))))
  with Reader() as reader:
    np.testing.assert_array_equal(source.read(reader, index=block), PARAMS[name][block])
    assert reader.bytes_read == 4 * math.prod(stop - start for start, stop in bounds)
    found = np.full(SHAPES[name], np.nan, np.float32)
    for chunk in chunks:
      found[chunk] = source.read(reader, index=chunk)
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
def test_a_tensor_of_another_shape_is_refused_unread(tmp_path, tensor, shape):
  tensors = {**checkpoint(TABLE, params=PARAMS), tensor: np.zeros(shape, np.float32)}
  safetensors_files.write(tmp_path, tensors, stem="model")
  with pytest.raises(InputError, match=f"here: {tensor} has shape"):
    sources(TABLE, stored=safetensors_files.stored(tmp_path, stem="model"), shapes=SHAPES, where="here")
