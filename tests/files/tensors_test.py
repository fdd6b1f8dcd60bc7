"""Blocks of tensors are read from files without the rest."""

import itertools
import os

import ml_dtypes
import numpy as np
import pytest

from distill.errors import InputError
from distill.files.tensors import Stored, TensorReader, finite

VALUE = np.arange(3 * 4 * 5, dtype=np.float32).reshape(3, 4, 5)
SLICES = [[slice(0, size), slice(1, size), slice(0, 1), slice(0, size, 2), slice(1, 1)] for size in VALUE.shape]


@pytest.fixture
def stored(tmp_path):
  (tmp_path / "file").write_bytes(b"0123456" + VALUE.tobytes() + b"rest")
  return Stored(path=tmp_path / "file", dtype=VALUE.dtype, shape=VALUE.shape, offset=7)


def test_a_block_read_alone_equals_the_slice_of_the_whole_tensor(stored, monkeypatch):
  counts, preadv = [], os.preadv
  monkeypatch.setattr(os, "preadv", lambda *arguments: counts.append(preadv(*arguments)) or counts[-1])
  reader = TensorReader()
  np.testing.assert_array_equal(reader.read(stored), VALUE)
  for index in itertools.product(*SLICES):
    counts.clear()
    block = reader.read(stored, index=index)
    np.testing.assert_array_equal(block, VALUE[index])
    assert sum(counts) == block.nbytes


def test_reading_a_tensor_of_a_file_that_became_shorter_is_refused(stored):
  os.truncate(stored.path, 50)
  with pytest.raises(InputError, match="file: the file is damaged, or was cut short while it was read"):
    TensorReader().read(stored)


def test_reading_a_tensor_of_a_deleted_file_is_refused(stored):
  stored.path.unlink()
  with pytest.raises(InputError, match="file: cannot be read"):
    TensorReader().read(stored)


def test_deleting_a_tensor_reader_closes_its_files(stored):
  before = len(os.listdir("/proc/self/fd"))
  reader = TensorReader()
  reader.read(stored)
  assert len(os.listdir("/proc/self/fd")) == before + 1
  del reader
  assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", ml_dtypes.bfloat16, ml_dtypes.float8_e5m2])
def test_infinities_and_nan_are_found_in_every_floating_dtype(dtype):
  largest = float(ml_dtypes.finfo(dtype).max)
  for odd in (np.inf, -np.inf, np.nan):
    assert not finite(np.asarray([1.0, odd]).astype(dtype))
  assert finite(np.asarray([0.0, -1.0, largest, -largest]).astype(dtype))
  assert finite(np.asarray([[1, 2]], np.int8))
