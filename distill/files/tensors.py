"""Reads any block of a tensor in a file without reading the rest of the tensor."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

import ml_dtypes
import numpy as np

from distill.errors import InputError

_FETCH_AGAIN = "fetch the file again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
  """A tensor in a file: `shape` values of `dtype` from byte `offset` on, in row-major order."""

  path: pathlib.Path
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int

  @property
  def nbytes(self) -> int:
    """Size of the tensor on disk, in bytes."""
    return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pending:
  """A tensor to be written. `make` creates it just before it is written, so that few tensors are in memory at once."""

  shape: tuple[int, ...]
  dtype: np.dtype
  make: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    """Size of the tensor on disk, in bytes."""
    return math.prod(self.shape) * self.dtype.itemsize


class TensorReader:
  """Reads blocks of stored tensors, and no bytes outside these blocks. Files stay open until the reader is deleted."""

  def __init__(self) -> None:
    self._open: dict[pathlib.Path, int] = {}

  def __del__(self) -> None:
    for descriptor in self._open.values():
      os.close(descriptor)

  def read(self, stored: Stored, *, index: Sequence[slice] | None = None) -> np.ndarray:
    """Reads a tensor, or the block that one slice for each dimension selects.

    Args:
      stored: The tensor.
      index: One slice for each dimension, with a positive step; None reads the whole tensor.

    Raises:
      InputError: The file cannot be read or has become shorter.
    """
    ranges = [
      range(size)[cut] for size, cut in zip(stored.shape, index or [slice(None)] * len(stored.shape), strict=True)
    ]
    out = np.empty([len(one) for one in ranges], stored.dtype)
    if not out.size:
      return out
    # A run is contiguous in the file: a stretch of one dimension with all of the dimensions after it.
    axis = len(ranges)
    while axis and len(ranges[axis - 1]) == stored.shape[axis - 1]:
      axis -= 1
    if axis and ranges[axis - 1].step == 1:
      axis -= 1
    strides = [math.prod(stored.shape[i + 1 :]) * stored.dtype.itemsize for i in range(len(ranges))]
    start = stored.offset + sum(one.start * stride for one, stride in zip(ranges[axis:], strides[axis:], strict=True))
    target = out.reshape(-1).view(np.uint8).data
    size = math.prod(len(one) for one in ranges[axis:]) * stored.dtype.itemsize
    descriptor = self._descriptor(stored.path)
    for i, offset in enumerate(_offsets(ranges[:axis], strides[:axis])):
      self._fill(target[i * size : (i + 1) * size], stored.path, descriptor, start + offset)
    return out

  def _descriptor(self, path: pathlib.Path) -> int:
    if path not in self._open:
      try:
        self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
      except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {_FETCH_AGAIN}") from error
    return self._open[path]

  @staticmethod
  def _fill(target: memoryview, path: pathlib.Path, descriptor: int, offset: int) -> None:
    done = 0
    while done < len(target):
      try:
        count = os.preadv(descriptor, [target[done:]], offset + done)
      except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {_FETCH_AGAIN}") from error
      if not count:
        raise InputError(f"{path}: the file is damaged, or was cut short while it was read; {_FETCH_AGAIN}")
      done += count


def _offsets(ranges: Sequence[range], strides: Sequence[int]) -> Iterator[int]:
  if not ranges:
    yield 0
    return
  for i in ranges[0]:
    for rest in _offsets(ranges[1:], strides[1:]):
      yield i * strides[0] + rest


def finite(value: np.ndarray) -> bool:
  """Returns True if an array holds neither infinities nor NaN."""
  if value.dtype.kind in "iub":
    return True
  if value.dtype.itemsize == 1:
    return bool(np.isfinite(value.astype(np.float32)).all())
  # Infinities and NaN have an exponent of all ones. ml_dtypes 0.5: isfinite is many times slower than integer masks.
  bits = {np.dtype(np.float16): 0x7C00, np.dtype(ml_dtypes.bfloat16): 0x7F80, np.dtype(np.float32): 0x7F800000}
  mask = bits.get(value.dtype, 0x7FF0000000000000)
  whole = np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}")
  return not bool(((whole & whole.dtype.type(mask)) == mask).any())
