"""safetensors files are written as the reference library does, and damaged ones are refused."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from distill.errors import InputError
from distill.files import safetensors_files
from distill.files.tensors import Pending

TENSORS = {
  "b": np.arange(6, dtype=np.float32).reshape(2, 3),
  "a": np.arange(4, dtype=np.float16),
  "c": np.asarray([1, 2], np.int64),
  "d": np.asarray([1.5, -2.0]).astype(ml_dtypes.bfloat16),
}


def test_a_written_safetensors_file_is_byte_equal_to_that_of_the_safetensors_library(tmp_path):
  safetensors_files.write(tmp_path, TENSORS, stem="model")
  safetensors.numpy.save_file(TENSORS, tmp_path / "reference.safetensors", metadata={"format": "pt"})
  assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "reference.safetensors").read_bytes()


@pytest.mark.parametrize("size", [10**9, 20])
def test_written_tensors_are_read_back_equal_from_one_file_or_several(tmp_path, size):
  pending = {name: Pending(shape=x.shape, dtype=x.dtype, make=x.copy) for name, x in TENSORS.items()}
  safetensors_files.write(tmp_path, pending, stem="model", max_file_bytes=size)
  found = safetensors_files.read(tmp_path, stem="model")
  assert set(found) == set(TENSORS)
  for name, value in TENSORS.items():
    assert found[name].dtype == value.dtype
    np.testing.assert_array_equal(found[name], value)
  assert safetensors_files.header(tmp_path, stem="model")["d"] == ("BF16", (2,))


def raw(path, entries, data=b"", *, text=None):
  text = json.dumps(entries).encode() if text is None else text
  path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(**changes):
  return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


@pytest.mark.parametrize(
  ("entries", "says"),
  [
    ({"a": entry(dtype="F31")}, "dtype 'F31' is not supported"),
    ({"a": entry(shape=[3])}, "8 bytes, but its shape needs 12"),
    ({"a": entry(shape=[-2])}, "must be a list of whole numbers"),
    ({"a": entry(), "b": entry()}, "overlaps the one before it"),
    ({"a": entry(data_offsets=[4, 12])}, "leaves a hole before it"),
    ({"a/b": entry()}, "not a valid tensor name"),
    ({"a": {"dtype": "F32"}}, "expected dtype, shape and data_offsets"),
    ({"a": entry(shape=[0, 2**60], data_offsets=[0, 0])}, "beyond what arrays can have"),
    ({"a": entry(), "__metadata__": {"x": 1}}, "__metadata__ = .*expected an object of strings"),
    ({"a": entry(data_offsets=[0, 8]), "b": entry(data_offsets=[8, 16])}, "cut short"),
    ({}, "too long"),
  ],
)
def test_a_safetensors_file_with_a_damaged_header_is_refused(tmp_path, entries, says):
  raw(tmp_path / "model.safetensors", entries, bytes(8))
  with pytest.raises(InputError, match=f"model.safetensors: .*{says}"):
    safetensors_files.stored(tmp_path, stem="model")


def test_a_safetensors_file_with_an_infinite_value_is_refused(tmp_path):
  safetensors_files.write(tmp_path, {"a": np.float32([1, np.inf])}, stem="model")
  with pytest.raises(InputError, match="tensor a holds values that are not finite"):
    safetensors_files.read(tmp_path, stem="model")


@pytest.mark.parametrize(
  ("change", "says"),
  [
    (lambda index: index["weight_map"].update(a="../model.safetensors"), "weight_map names '../model.safetensors'"),
    (lambda index: index["weight_map"].update(a=index["weight_map"]["b"]), "tensor 'a' is not where the index says"),
    (lambda index: index.pop("weight_map"), "no weight_map"),
  ],
)
def test_an_index_that_contradicts_the_files_is_refused(tmp_path, change, says):
  safetensors_files.write(tmp_path, TENSORS, stem="model", max_file_bytes=20)
  path = tmp_path / "model.safetensors.index.json"
  index = json.loads(path.read_text())
  change(index)
  path.write_text(json.dumps(index))
  with pytest.raises(InputError, match=says):
    safetensors_files.stored(tmp_path, stem="model")


def test_a_pickled_checkpoint_is_refused_without_being_opened(tmp_path):
  (tmp_path / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(
    InputError, match=r"pytorch_model\.bin is never opened, as it may hold code; convert it to safetensors"
  ):
    safetensors_files.stored(tmp_path, stem="model")


def test_the_digest_of_a_model_depends_on_its_weights_and_on_config_json(tmp_path):
  def digest():
    return safetensors_files.digest(tmp_path, stem="model", settings="config.json")

  safetensors_files.write(tmp_path, TENSORS, stem="model")
  (tmp_path / "config.json").write_text("{}")
  first = digest()
  assert digest() == first
  (tmp_path / "config.json").write_text("{ }")
  second = digest()
  safetensors_files.write(tmp_path, {**TENSORS, "a": TENSORS["a"] + 1}, stem="model")
  assert len({first, second, digest()}) == 3
