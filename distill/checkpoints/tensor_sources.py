"""Where a canonical parameter lies in a checkpoint: reading any block of it from there, and writing it back."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from distill.checkpoints.name_table import TensorEntry, checkpoint, to_ours
from distill.errors import InputError
from distill.files.tensors import Pending, Reader, Stored, finite

Block = tuple[slice, ...]

_FLOATS = tuple(map(np.dtype, (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """One canonical parameter: the rows of the name table that make it, each with the tensor it is taken from.

  Attributes:
    shape: Of the parameter.
    pieces: A single one, or one for each place on the leading axis (experts).
    twin: What must hold the same values: a tied head that is stored as well.
  """

  shape: tuple[int, ...]
  pieces: tuple[tuple[TensorEntry, Stored], ...]
  twin: tuple[TensorEntry, Stored] | None = None

  @property
  def dtype(self) -> np.dtype:
    """Of the first piece, as stored."""
    return self.pieces[0][1].dtype

  def read(self, reader: Reader, *, index: Block | None = None) -> np.ndarray:
    """The block of the parameter that `index` cuts out, in the dtype it is stored in.

    Raises:
      InputError: The file cannot be read, or holds values that are not finite or not those of the twin.
    """
    index = index or tuple(slice(0, size) for size in self.shape)
    if self.pieces[0][0].expert is not None:
      return np.stack([_read(reader, *piece, index=index[1:]) for piece in self.pieces[index[0]]])
    value = _read(reader, *self.pieces[0], index=index)
    if self.twin is not None and not np.array_equal(value, _read(reader, *self.twin, index=index)):
      entry, stored = self.twin
      raise InputError(f"{stored.path}: {entry.theirs} differs from the embedding it is tied to in config.json")
    return value

  def chunks(self, index: Block, *, size: int) -> Iterator[Block]:
    """`index` cut into blocks of about `size` bytes along the axis whose rows lie together on disk."""
    entry, stored = self.pieces[0]
    if entry.expert is not None and index[0].stop - index[0].start > 1:
      for i in range(index[0].start, index[0].stop):
        yield from self.chunks((slice(i, i + 1), *index[1:]), size=size)
      return
    axis = _major(entry, len(self.shape))
    if axis >= len(index):
      yield index
      return
    row = math.prod(one.stop - one.start for one in index) // max(index[axis].stop - index[axis].start, 1)
    step = max(1, size // max(row * stored.dtype.itemsize, 1))
    for start in range(index[axis].start, index[axis].stop, step):
      yield (*index[:axis], slice(start, min(start + step, index[axis].stop)), *index[axis + 1 :])


def _major(entry: TensorEntry, dimensions: int) -> int:
  """Our axis that is the first of the file's."""
  if entry.form == "copy":
    return int(entry.expert is not None)
  # The transposed matrices of all experts may be one tensor.
  together = entry.form == "transpose" and entry.expert is None and dimensions > 2
  return 0 if together else dimensions - 1


def _read(reader: Reader, entry: TensorEntry, stored: Stored, *, index: Block) -> np.ndarray:
  whole = dataclasses.replace(entry, part=None)
  last = index[-1]
  cuts = [last] if entry.part is None else entry.part.cuts(last.start, last.stop)
  values = []
  for cut in ((*index[:-1], cut) for cut in cuts):
    there = {"copy": cut, "transpose": (*cut[:-2], *cut[:-3:-1])}.get(entry.form) or (cut[1], slice(0, 1), cut[0])
    values.append(to_ours(reader.read(stored, index=there), entry=whole))
  value = values[0] if len(values) == 1 else np.concatenate(values, axis=-1)
  if not finite(value):
    raise InputError(
      f"{stored.path}: tensor {entry.theirs} holds values that are not finite; fetch the damaged weights again"
    )
  return value


def sources(
  table: Iterable[TensorEntry], *, stored: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, Source]:
  """The source of every canonical parameter of the table; all is known from the headers, nothing is read.

  Args:
    table: Rows of the architecture.
    stored: Where the checkpoint's tensors lie; all that the table names must be there.
    shapes: What the architecture expects.
    where: Of the messages: the directory.

  Raises:
    InputError: A tensor has another shape than config.json says, is not of floating numbers, or holds more than the
      parameters that are cut out of it.
  """
  pieces: dict[str, list[tuple[TensorEntry, Stored]]] = {}
  covered: dict[str, int] = {}
  for entry in table:
    one = stored[entry.theirs]
    if one.dtype not in _FLOATS:
      raise InputError(f"{where}: {entry.theirs} is stored as {one.dtype}; give weights that are not quantised")
    pieces.setdefault(entry.ours, []).append((entry, one))
    if entry.part is not None:
      covered[entry.theirs] = covered.get(entry.theirs, 0) + shapes[entry.ours][-1]
  found = {}
  for name, rows in pieces.items():
    rows.sort(key=lambda row: row[0].expert or 0)
    for entry, one in rows:
      whole, piece = _shape(entry, one)
      shape = piece if entry.expert is None else (len(rows), *piece)
      if shape != shapes[name] or covered.get(entry.theirs, whole) != whole:
        raise InputError(
          f"{where}: {entry.theirs} has shape {one.shape} (as {name}), config.json says {shapes[name]} of it"
        )
    found[name] = Source(shape=shapes[name], pieces=tuple(rows))
  return found


def _shape(entry: TensorEntry, stored: Stored) -> tuple[int, tuple[int, ...]]:
  """(length of the whole tensor's last axis as ours, shape of the piece); nothing fits other axes or periods."""
  if entry.form == "conv" and len(stored.shape) != 3:
    return 0, ()
  whole = to_ours(np.broadcast_to(np.int8(0), stored.shape or (0,)), entry=dataclasses.replace(entry, part=None))
  if entry.part is not None and whole.shape[-1] % (entry.part.period or 1):
    return 0, ()
  return whole.shape[-1], stored.shape and (whole if entry.part is None else entry.part.take(whole)).shape


def pending(table: Iterable[TensorEntry], *, params: Mapping[str, Any]) -> dict[str, Pending]:
  """Every tensor of the checkpoint, made from canonical parameters only when it is written."""
  rows: dict[str, list[TensorEntry]] = {}
  for entry in table:
    rows.setdefault(entry.theirs, []).append(entry)

  def one(theirs: str, entries: list[TensorEntry]) -> Pending:
    def make() -> np.ndarray:
      return checkpoint(entries, params=params)[theirs]

    shape = list(np.shape(params[entries[0].ours]))[entries[0].expert is not None :]
    if entries[0].part is not None:
      shape[-1] = sum(np.shape(params[entry.ours])[-1] for entry in entries)
    if entries[0].form == "transpose":
      shape[-2:] = shape[:-3:-1]
    elif entries[0].form == "conv":
      shape = [shape[1], 1, shape[0]]
    return Pending(shape=tuple(shape), dtype=np.dtype(params[entries[0].ours].dtype), make=make)

  return {theirs: one(theirs, entries) for theirs, entries in rows.items()}
