"""The name table of a family: which tensor of a checkpoint holds which canonical parameter, in which layout."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Part:
  """The columns of one parameter in a tensor that holds several parameters (fused projections).

  These are columns `start` to `stop` (exclusive) of the last axis; with a `period`, those of each group of `period`
  columns.
  """

  start: int
  stop: int
  period: int | None = None

  def _grouped(self, value: np.ndarray) -> np.ndarray:
    period = self.period or value.shape[-1]
    return value.reshape(*value.shape[:-1], value.shape[-1] // max(period, 1), period)[..., self.start : self.stop]

  def take(self, value: np.ndarray) -> np.ndarray:
    """Returns this part's columns of `value`, an array [..., columns] with all columns of the tensor.

    If the part has a `period`, their number must be a multiple of it.
    """
    found = self._grouped(value)
    return found.reshape(*value.shape[:-1], found.shape[-2] * found.shape[-1])

  def put(self, whole: np.ndarray, piece: np.ndarray) -> None:
    """Writes `piece`, this part's columns, into the contiguous array `whole` of all columns, in place."""
    target = self._grouped(whole)
    target[...] = piece.reshape(target.shape)

  def cuts(self, start: int, stop: int) -> list[slice]:
    """Returns slices of the whole tensor's last axis which together select columns `start` to `stop` of this part."""
    width = self.stop - self.start
    if self.period is None:
      return [slice(self.start + start, self.start + stop)]
    if width == 1:
      first = self.start + self.period * start
      return [slice(first, first + self.period * (stop - start - 1) + 1, self.period)]
    runs = []
    for group in range(start // width, -(-stop // width)):
      ahead = group * (self.period - width) + self.start
      runs.append(slice(ahead + max(start, group * width), ahead + min(stop, (group + 1) * width)))
    return runs


@dataclasses.dataclass(frozen=True)
class TensorEntry:
  """One canonical parameter, or a piece of it, with the tensor that holds it.

  Attributes:
    ours: Canonical name.
    theirs: Name in the HF checkpoint.
    form: How the checkpoint stores it: 'copy', 'transpose' ([…, O, I] for our […, I, O]) or 'conv' ([I, 1, W] for our
      [W, I]).
    part: The parameter's columns of the tensor, in our layout, if the tensor holds several parameters (fused
      projections), else None. Together the parts cover the tensor.
    expert: Index of the expert on our first axis if the checkpoint has one tensor for each expert, else None.
  """

  ours: str
  theirs: str
  form: str = "copy"
  part: Part | None = None
  expert: int | None = None


# Buffers that older versions of transformers saved. They are computed, not loaded.
_BUFFER = re.compile(r"(.*\.)?(rotary_emb\.(inv_freq|cos_cached|sin_cached)|h\.\d+\.attn\.(bias|masked_bias))")


def spellings(found: Iterable[str], *, table: Iterable[TensorEntry], ignored: str = "") -> dict[str, str]:
  """Returns a dictionary: name of a tensor in the name table -> name of this tensor in the checkpoint.

  The two differ in checkpoints that were saved without a head: these leave out the prefix of names, such as `model.`.

  Args:
    found: Names in the checkpoint. Buffers that older versions of transformers saved are left out of the result.
    table: The name table.
    ignored: Regex for the start of further names to leave out of the result.
  """
  found = [name for name in found if not _BUFFER.fullmatch(name) and not (ignored and re.match(ignored, name))]
  prefix = next(iter(table)).theirs.split(".", 1)[0] + "."
  if any(name.startswith(prefix) for name in found):
    return {name: name for name in found}
  return {name if name.startswith("lm_head.") else prefix + name: name for name in found}


def to_ours(value: np.ndarray, *, entry: TensorEntry) -> np.ndarray:
  """Converts a tensor of a checkpoint to the piece of a canonical parameter that `entry` describes."""
  if entry.form == "transpose":
    value = _transposed(value)
  elif entry.form == "conv" and value.ndim == 3:
    value = value[:, 0].T
  return value if entry.part is None else entry.part.take(value)


def checkpoint(table: Iterable[TensorEntry], *, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Converts canonical parameters to the tensors of a checkpoint: name -> array. The inverse of `to_ours`."""
  tensors: dict[str, np.ndarray] = {}
  parts: dict[str, list[TensorEntry]] = {}
  for entry in table:
    if entry.part is not None:
      parts.setdefault(entry.theirs, []).append(entry)
      continue
    tensors[entry.theirs] = _to_theirs(_piece(params, entry), form=entry.form)
  for theirs, entries in parts.items():
    first = _piece(params, entries[0])
    whole = np.empty((*first.shape[:-1], sum(_piece(params, entry).shape[-1] for entry in entries)), first.dtype)
    for entry in entries:
      assert entry.part is not None, entry
      entry.part.put(whole, _piece(params, entry))
    tensors[theirs] = _to_theirs(whole, form=entries[0].form)
  return tensors


def _piece(params: Mapping[str, Any], entry: TensorEntry) -> np.ndarray:
  value = np.asarray(params[entry.ours])
  return value if entry.expert is None else value[entry.expert]


def _to_theirs(value: np.ndarray, *, form: str) -> np.ndarray:
  if form == "transpose":
    value = _transposed(value)
  elif form == "conv":
    value = value.T[:, None]
  return np.ascontiguousarray(value)


def _transposed(value: np.ndarray) -> np.ndarray:
  return value.swapaxes(-1, -2) if value.ndim > 1 else value
