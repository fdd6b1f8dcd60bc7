"""The protocol that every checkpoint format implements: it lists the tensors and reads any block of one."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np

from distill.files import safetensors_files
from distill.files.tensors import TensorReader

# One slice with plain bounds for each dimension.
Block = tuple[slice, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
  """One tensor of a checkpoint.

  Attributes:
    name: Its name in the checkpoint.
    dtype: The dtype of the values that `TensorSource.read` returns.
    shape: Shape of the whole tensor.
    path: The file that holds it, for messages.
  """

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  path: pathlib.Path


@runtime_checkable  # The tests check signatures at run time.
class TensorSource(Protocol):
  """Lists and reads the tensors of one checkpoint. Its file format matters only to the implementation."""

  def tensors(self) -> Mapping[str, TensorInfo]:
    """Returns every tensor by its name, from headers alone."""
    ...

  def read(self, name: str, *, index: Block) -> np.ndarray:
    """Reads one block of a tensor, and as little of the files as the format allows.

    Raises:
      InputError: The file cannot be read or is damaged.
    """
    ...


class SafetensorsSource:
  """A `TensorSource` of `{stem}.safetensors`, or of several such files with an index.

  Args:
    directory: The directory of the files.
    stem: File name without `.safetensors`.

  Raises:
    InputError: Missing or damaged files.
  """

  def __init__(self, directory: pathlib.Path, *, stem: str):
    self._stored = safetensors_files.stored(directory, stem=stem)
    self._reader = TensorReader()

  def tensors(self) -> Mapping[str, TensorInfo]:
    """Returns every tensor by its name."""
    return {
      name: TensorInfo(name=name, dtype=one.dtype, shape=one.shape, path=one.path) for name, one in self._stored.items()
    }

  def read(self, name: str, *, index: Block) -> np.ndarray:
    """Reads exactly the bytes of one block of a tensor.

    Raises:
      InputError: The file cannot be read or has become shorter.
    """
    return self._reader.read(self._stored[name], index=index)
