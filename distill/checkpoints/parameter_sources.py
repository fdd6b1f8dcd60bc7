"""Reads blocks of canonical parameters from the tensors of a checkpoint, and converts parameters back to tensors."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from distill.checkpoints.name_table import TensorEntry, checkpoint, to_ours
from distill.checkpoints.tensor_source import Block, TensorInfo, TensorSource
from distill.errors import InputError
from distill.files.tensors import Pending, finite

_FLOATS = tuple(map(np.dtype, (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterSource:
  """Reads one canonical parameter from the tensors of a checkpoint.

  Attributes:
    tensors: Reader of the checkpoint's tensors.
    shape: Shape of the parameter.
    pieces: Pairs (entry of the name table, tensor): one pair if a single tensor holds the parameter, or one for each
      index of the first axis (experts).
    tied_head: For an embedding, the tensor of a head that is tied to it but stored as well. Both must hold the same
      values. Otherwise None.
  """

  tensors: TensorSource
  shape: tuple[int, ...]
  pieces: tuple[tuple[TensorEntry, TensorInfo], ...]
  tied_head: tuple[TensorEntry, TensorInfo] | None = None

  @property
  def dtype(self) -> np.dtype:
    """The dtype in which the checkpoint stores the parameter; that of the first tensor if it is stored as several."""
    return self.pieces[0][1].dtype

  def read(self, *, index: Block | None = None) -> np.ndarray:
    """Reads one block of the parameter, by default all of it, in the checkpoint's dtype.

    Raises:
      InputError: A file cannot be read, a value is not finite, or a stored tied head differs from the embedding.
    """
    index = index or tuple(slice(0, size) for size in self.shape)
    if self.pieces[0][0].expert is not None:
      return np.stack([self._read(*piece, index=index[1:]) for piece in self.pieces[index[0]]])
    value = self._read(*self.pieces[0], index=index)
    if self.tied_head is not None and not np.array_equal(value, self._read(*self.tied_head, index=index)):
      entry, info = self.tied_head
      raise InputError(
        f"{info.path}: {entry.theirs} differs from the embedding, but config.json ties them; set tie_word_embeddings "
        "to false"
      )
    return value

  def _read(self, entry: TensorEntry, info: TensorInfo, *, index: Block) -> np.ndarray:
    whole = dataclasses.replace(entry, part=None)
    last = index[-1]
    cuts = [last] if entry.part is None else entry.part.cuts(last.start, last.stop)
    values = []
    for cut in ((*index[:-1], cut) for cut in cuts):
      stored = {"copy": cut, "transpose": (*cut[:-2], *cut[:-3:-1])}.get(entry.form) or (cut[1], slice(0, 1), cut[0])
      values.append(to_ours(self.tensors.read(info.name, index=stored), entry=whole))
    value = values[0] if len(values) == 1 else np.concatenate(values, axis=-1)
    if not finite(value):
      raise InputError(
        f"{info.path}: tensor {entry.theirs} holds values that are not finite; fetch the damaged weights again"
      )
    return value

  def chunks(self, index: Block, *, size: int) -> Iterator[Block]:
    """Splits the block `index` into blocks of about `size` bytes, along the axis that is outermost on disk."""
    entry, info = self.pieces[0]
    if entry.expert is not None and index[0].stop - index[0].start > 1:
      for i in range(index[0].start, index[0].stop):
        yield from self.chunks((slice(i, i + 1), *index[1:]), size=size)
      return
    axis = _outermost(entry, len(self.shape))
    if axis >= len(index):
      yield index
      return
    row = math.prod(one.stop - one.start for one in index) // max(index[axis].stop - index[axis].start, 1)
    step = max(1, size // max(row * info.dtype.itemsize, 1))
    for start in range(index[axis].start, index[axis].stop, step):
      yield (*index[:axis], slice(start, min(start + step, index[axis].stop)), *index[axis + 1 :])


def _outermost(entry: TensorEntry, dimensions: int) -> int:
  """Returns the index of the parameter's axis that is outermost on disk."""
  if entry.form == "copy":
    return int(entry.expert is not None)
  # One tensor may hold the transposed matrices of all experts.
  all_experts = entry.form == "transpose" and entry.expert is None and dimensions > 2
  return 0 if all_experts else dimensions - 1


def parameter_sources(
  table: Iterable[TensorEntry],
  *,
  tensors: TensorSource,
  infos: Mapping[str, TensorInfo],
  shapes: Mapping[str, tuple[int, ...]],
  where: str,
) -> dict[str, ParameterSource]:
  """Returns canonical name -> source of every parameter. Reads no weights, only what the headers say of them.

  Args:
    table: The name table of the architecture.
    tensors: Reader of the checkpoint's tensors.
    infos: Name of a tensor -> its shape, dtype and file as the checkpoint's headers give them; for all tensors in the
      table.
    shapes: Canonical name -> shape, for all parameters of the architecture.
    where: The directory, for error messages.

  Raises:
    InputError: A tensor has another shape than config.json says, has no floating dtype, or is larger than the
      parameters that the table takes from it.
  """
  pieces: dict[str, list[tuple[TensorEntry, TensorInfo]]] = {}
  covered: dict[str, int] = {}
  for entry in table:
    info = infos[entry.theirs]
    if info.dtype not in _FLOATS:
      raise InputError(f"{where}: {entry.theirs} is stored as {info.dtype}; give weights that are not quantised")
    pieces.setdefault(entry.ours, []).append((entry, info))
    if entry.part is not None:
      covered[entry.theirs] = covered.get(entry.theirs, 0) + shapes[entry.ours][-1]
  found = {}
  for name, rows in pieces.items():
    rows.sort(key=lambda row: row[0].expert or 0)
    for entry, info in rows:
      whole, piece = _shape(entry, info)
      shape = piece if entry.expert is None else (len(rows), *piece)
      if shape != shapes[name] or covered.get(entry.theirs, whole) != whole:
        raise InputError(
          f"{where}: {entry.theirs} has shape {info.shape}, which does not fit shape {shapes[name]} of {name} in "
          "config.json; fetch weights and config.json of the same model"
        )
    found[name] = ParameterSource(tensors=tensors, shape=shapes[name], pieces=tuple(rows))
  return found


def _shape(entry: TensorEntry, info: TensorInfo) -> tuple[int, tuple[int, ...]]:
  """Returns (size of the whole tensor's last axis in our layout, shape of the piece that `entry` takes from it).

  The shape is empty, which fits no parameter, if the tensor cannot be transposed or split as `entry` says.
  """
  if entry.form == "conv" and len(info.shape) != 3:
    return 0, ()
  whole = to_ours(np.broadcast_to(np.int8(0), info.shape or (0,)), entry=dataclasses.replace(entry, part=None))
  if entry.part is not None and whole.shape[-1] % (entry.part.period or 1):
    return 0, ()
  return whole.shape[-1], info.shape and (whole if entry.part is None else entry.part.take(whole)).shape


def tensors_to_write(table: Iterable[TensorEntry], *, params: Mapping[str, Any]) -> dict[str, Pending]:
  """Returns tensor name -> tensor, for all tensors of a checkpoint. Each is made only when it is written.

  Making a tensor transposes the canonical parameters that it holds and joins them, as the table says.

  Args:
    table: The name table of the architecture.
    params: All canonical parameters.
  """
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
