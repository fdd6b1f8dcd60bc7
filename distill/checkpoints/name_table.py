"""The name table of a family: rows that tie a canonical parameter to where a checkpoint keeps it, both ways."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Part:
  """Columns of a tensor that holds several parameters: `start` to `stop` of every `period` columns, or of all."""

  start: int
  stop: int
  period: int | None = None

  def _grouped(self, value: np.ndarray) -> np.ndarray:
    period = self.period or value.shape[-1]
    return value.reshape(*value.shape[:-1], value.shape[-1] // max(period, 1), period)[..., self.start : self.stop]

  def take(self, value: np.ndarray) -> np.ndarray:
    """These columns of the last axis, which is a multiple of the period."""
    found = self._grouped(value)
    return found.reshape(*value.shape[:-1], found.shape[-2] * found.shape[-1])

  def put(self, whole: np.ndarray, piece: np.ndarray) -> None:
    """Writes these columns of a contiguous array."""
    target = self._grouped(whole)
    target[...] = piece.reshape(target.shape)

  def cuts(self, start: int, stop: int) -> list[slice]:
    """Where columns `start` to `stop` of the piece are in the whole."""
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
  """One parameter, or one piece of it, under both names.

  Attributes:
    ours: Canonical name.
    theirs: Name in the HF checkpoint.
    form: 'copy', 'transpose' ([…, out, in] for our […, in, out]) or 'conv' ([I, 1, W] for our [W, I]).
    part: Of the checkpoint's tensor along OUR last axis, where it holds several of our parameters (fused projections);
      together the parts cover it.
    expert: Place on our leading axis, where the checkpoint holds one tensor an expert.
  """

  ours: str
  theirs: str
  form: str = "copy"
  part: Part | None = None
  expert: int | None = None


# What older versions stored beside the weights, and every version computes again.
_BUFFER = re.compile(r"(.*\.)?(rotary_emb\.(inv_freq|cos_cached|sin_cached)|h\.\d+\.attn\.(bias|masked_bias))")


def spellings(found: Iterable[str], *, table: Iterable[TensorEntry], ignored: str = "") -> dict[str, str]:
  """Names of the table -> names in the file, for a checkpoint as people have it.

  Buffers of older versions are left out, and names that match `ignored`. A model saved without its head lacks the first
  part of every name.
  """
  found = [name for name in found if not _BUFFER.fullmatch(name) and not (ignored and re.match(ignored, name))]
  prefix = next(iter(table)).theirs.split(".", 1)[0] + "."
  if any(name.startswith(prefix) for name in found):
    return {name: name for name in found}
  return {name if name.startswith("lm_head.") else prefix + name: name for name in found}


def to_ours(value: np.ndarray, *, entry: TensorEntry) -> np.ndarray:
  """A checkpoint's tensor as the piece of our parameter that `entry` describes."""
  if entry.form == "transpose":
    value = _transposed(value)
  elif entry.form == "conv" and value.ndim == 3:
    value = value[:, 0].T
  return value if entry.part is None else entry.part.take(value)


def checkpoint(table: Iterable[TensorEntry], *, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Every tensor of the checkpoint, contiguous; undoes `to_ours`."""
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
