"""Sections of a teacher cache: each holds a teacher's signal for the rows of one token store, readable in any order.

A teacher cache is a directory with a section for each pair of a token store and a teacher. A section is a folder with
a manifest, which names everything that the rows depend on, and with shards: safetensors files of equally many rows (the
last may have fewer). Each row has a checksum.
"""

import collections
import hashlib
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from distill.errors import InputError
from distill.files import safetensors_files
from distill.files.json_file import read_json
from distill.files.replace import replace_file
from distill.teachers.row_format import row_format
from distill.types import NO_CAPTURE, Capture, SparseSignal

FORMAT = 1
MANIFEST = "manifest.json"
_OPEN_SHARDS = 128
_DELETE_AND_RERUN = "delete it and run distill cache again"
# Keys of a manifest that say what a section was made for. Each has the words with which an error message describes a
# section that differs in this key; of several differences the first is reported.
SUBJECT: Mapping[str, str] = {
  "teacher": "another teacher than config.teacher.model",
  "adapters": "other adapters, or in another order, than the teacher has for these rows",
  "tokenizer": "another tokenizer's tokens",
  "length": "rows of another length",
  "store": "other text",
}
_KEYS = frozenset(
  {*SUBJECT, "format", "rows", "source", "width", "depth", "vocab_size", "dtype", "teacher_dtype", "seed", "batch_size"}
  | {"targets", "size", "temperature", "layers", "mixers", "shard_rows"}
)
_COUNTS = ("rows", "length", "width", "depth", "vocab_size", "batch_size", "shard_rows")
_LISTS = ("adapters", "layers", "mixers")


class Section:
  """A section on disk: one teacher's signal for the rows of one token store.

  Args:
    directory: Directory with the manifest.
    open_shards: Table of open shards, which several sections share. It limits how many are open in all: the least
      recently used shard is closed first. None for a new table, which only this section uses.

  Attributes:
    manifest: The parsed manifest: everything that the rows depend on.
    identity: Digest of the manifest.
    format: Encoding of the rows.
    shard_rows: Number of rows in a shard; the last one may have fewer.
    count: Number of rows in the section.

  Raises:
    InputError: The manifest is missing, damaged or of another version.
  """

  def __init__(self, directory: pathlib.Path, *, open_shards: "OpenShards | None" = None):
    self.directory = pathlib.Path(directory)
    path = self.directory / MANIFEST
    self.manifest = read_json(path, hint="give a directory that distill cache has written")
    delete_and_rerun = f"delete {self.directory} and run distill cache again"
    if self.manifest.get("format") != FORMAT or set(self.manifest) != _KEYS:
      raise InputError(f"{path}: the manifest is damaged or of another version of distill; {delete_and_rerun}")
    for key in _KEYS:
      value = self.manifest[key]
      if key in _COUNTS and not (type(value) is int and 0 < value < 2**48):
        raise InputError(f"{path}: {key} is {value!r}, which is not a positive whole number; {delete_and_rerun}")
      if key in _LISTS and not isinstance(value, list):
        raise InputError(f"{path}: {key} is {value!r}, which is not a list; {delete_and_rerun}")
    self.identity = identity(self.manifest)
    self.format = row_format(self.manifest, where=str(path))
    self.shard_rows, self.count = self.manifest["shard_rows"], self.manifest["rows"]
    self._open: OpenShards = collections.OrderedDict() if open_shards is None else open_shards

  def missing(self) -> list[int]:
    """Returns the indices of the shards that are not written yet."""
    return [n for n in range(-(-self.count // self.shard_rows)) if not self.path(n).is_file()]

  def path(self, shard: int) -> pathlib.Path:
    """Returns the path of a shard's file."""
    return self.directory / f"{shard:05}.safetensors"

  def bounds(self, shard: int) -> range:
    """Returns the range of token store rows that a shard holds."""
    return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.count))

  def write(self, shard: int, rows: Sequence[bytes]) -> None:
    """Writes a shard of packed rows atomically: its file exists whole or not at all.

    Args:
      shard: Index of the shard.
      rows: Bytes of all its rows in order, from `RowFormat.pack`.
    """
    assert len(rows) == len(self.bounds(shard)), (shard, len(rows))
    tensors: dict[str, np.ndarray] = {
      "rows": np.frombuffer(b"".join(rows), np.uint8),
      "ends": np.cumsum([len(row) for row in rows]).astype(np.uint64),
      "sums": np.asarray([_sum(row, at) for at, row in zip(self.bounds(shard), rows, strict=True)], np.uint32),
      "identity": np.frombuffer(bytes.fromhex(self.identity), np.uint8),
    }
    try:
      with replace_file(self.path(shard)) as work:
        safetensors_files.write(work.parent, tensors, stem=work.stem, max_file_bytes=2**62)
    except FileNotFoundError:
      # Another process has written the same shard, and removed what was begun of it.
      if not self.path(shard).is_file():
        raise
    for begun in self.directory.glob(f".{self.path(shard).name}-*"):
      shutil.rmtree(begun, ignore_errors=True)

  def read(self, rows: Int[np.ndarray, " B"], capture: Capture = NO_CAPTURE) -> SparseSignal:
    """Returns the sparse targets [B,T,k] and the captured activations [B,T,D] of token store rows.

    Args:
      rows: Indices of the rows, in any order.
      capture: Activations to return, all of which the section must hold.

    Raises:
      InputError: A shard is missing, damaged, or of another cache.
    """
    found = [self.format.unpack(self._read(int(row)), capture) for row in rows]
    return jax.tree.map(lambda *parts: np.stack(parts), *found)

  def _read(self, row: int) -> bytes:
    number, place = divmod(row, self.shard_rows)
    path = self.path(number)
    if path in self._open:
      self._open.move_to_end(path)
    else:
      self._open[path] = _Shard(path, identity=self.identity, rows=len(self.bounds(number)))
      if len(self._open) > _OPEN_SHARDS:
        self._open.popitem(last=False)
    return self._open[path].read(place, row)


class _Shard:
  """A shard file of a section, memory-mapped; its structure and identity are checked when it is opened."""

  def __init__(self, path: pathlib.Path, *, identity: str, rows: int):
    self._path = path
    places = safetensors_files.stored(path.parent, stem=path.stem)
    shapes = {name: (one.dtype, one.shape) for name, one in places.items()}
    expected: dict[str, Any] = {
      "rows": (np.dtype(np.uint8), shapes.get("rows", (None, ()))[1][:1]),
      "ends": (np.dtype(np.uint64), (rows,)),
      "sums": (np.dtype(np.uint32), (rows,)),
      "identity": (np.dtype(np.uint8), (32,)),
    }
    if shapes != expected:
      raise InputError(f"{path}: this file is not a shard of {rows} rows; {_DELETE_AND_RERUN}")
    mapped = np.memmap(path, np.uint8, "r")

    def tensor(name: str) -> np.ndarray:
      one = places[name]
      return mapped[one.offset : one.offset + one.nbytes].view(one.dtype)

    if tensor("identity").tobytes().hex() != identity:
      raise InputError(
        f"{path}: this shard is damaged, or belongs to another cache than the {MANIFEST} in its folder; "
        f"{_DELETE_AND_RERUN}"
      )
    self._rows, self._ends, self._sums = tensor("rows"), np.array(tensor("ends")), np.array(tensor("sums"))

  def read(self, place: int, row: int) -> bytes:
    """Returns the bytes of one row, after a check of its checksum.

    Args:
      place: Index of the row in the shard.
      row: Index of the same row in the token store, which is part of the checksum.

    Raises:
      InputError: The checksum differs from the recorded one.
    """
    begin, end = int(self._ends[place - 1]) if place else 0, int(self._ends[place])
    data = self._rows[begin:end].tobytes() if begin <= end <= len(self._rows) else b""
    if _sum(data, row) != int(self._sums[place]):
      raise InputError(
        f"{self._path}: row {row} of the token store is damaged: its checksum differs from the recorded one; "
        f"{_DELETE_AND_RERUN}"
      )
    return data


OpenShards = collections.OrderedDict[pathlib.Path, _Shard]


def _sum(data: bytes, row: int) -> int:
  """Returns a checksum over a row's bytes and its index in the token store, so that swapped rows are detected."""
  return zlib.crc32(data, row & 0xFFFFFFFF)


def identity(manifest: Mapping[str, Any]) -> str:
  """Returns the digest of a manifest, which identifies its section."""
  return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def claim(directory: pathlib.Path, manifest: Mapping[str, Any]) -> Section:
  """Returns the section for `manifest` in a teacher cache, and creates it if it is missing.

  Raises:
    InputError: A section for the same rows and teacher has other settings, or the directory cannot be written.
  """
  subject = {key: manifest[key] for key in SUBJECT}
  target = pathlib.Path(directory) / identity(subject)[:16]
  try:
    target.mkdir(parents=True, exist_ok=True)
    if not (target / MANIFEST).exists():
      # Another process may do the same at this moment.
      with replace_file(target / MANIFEST) as work:
        work.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
  except OSError as error:
    raise InputError(
      f"{directory}: the teacher cache cannot be written ({error.strerror}); name another --workdir"
    ) from error
  section = Section(target)
  if section.identity != identity(manifest):
    key = next(key for key in sorted(_KEYS) if section.manifest[key] != manifest[key])
    raise InputError(
      f"{target / MANIFEST}: {key} is {section.manifest[key]} in this section, but {manifest[key]} in the "
      f"configuration; name another --workdir, or delete {target}"
    )
  return section


def open_sections(directory: str | os.PathLike[str]) -> list[Section]:
  """Opens a teacher cache; returns its sections, one for each teacher and token store.

  The sections share one limit on the number of open shards.

  Raises:
    InputError: The directory holds no section, or a manifest is damaged.
  """
  open_shards: OpenShards = collections.OrderedDict()
  found = [
    Section(path.parent, open_shards=open_shards) for path in sorted(pathlib.Path(directory).glob(f"*/{MANIFEST}"))
  ]
  if not found:
    raise InputError(
      f"config.teacher.cache: {directory} holds no teacher cache; run distill cache with --workdir={directory}"
    )
  return found


def find_section(sections: Sequence[Section], subject: Mapping[str, Any], *, what: str) -> Section:
  """Returns the section that was made for a teacher and a token store.

  Args:
    sections: Sections of the cache.
    subject: What the section must have been made for: key of its manifest ('teacher', 'adapters', 'tokenizer', 'length'
      or 'store') -> value. A key that is left out may have any value.
    what: Name of the token store in error messages.

  Raises:
    InputError: No section matches `subject`, several do, or the section lacks shards. If none matches, the message says
      where the most similar section differs.
  """

  def wrong(section: Section) -> list[str]:
    return [key for key in SUBJECT if key in subject and section.manifest[key] != subject[key]]

  nearest = min(sections, key=lambda section: (len(wrong(section)), [SUBJECT[key] for key in wrong(section)]))
  if keys := wrong(nearest):
    key, difference = keys[0], SUBJECT[keys[0]]
    raise InputError(
      f"{nearest.directory / MANIFEST}: key {key}: the section was made for {difference}, and no other section of the "
      f"cache fits {what}; run distill cache with this configuration"
    )
  if [one for one in sections if not wrong(one)] != [nearest]:
    raise InputError(
      f"config.teacher.cache: {nearest.directory.parent} holds sections of several teachers for {what}; set "
      "config.teacher.model to choose one"
    )
  if missing := nearest.missing():
    first = nearest.path(missing[0])
    raise InputError(f"{first}: missing (shards missing in all: {len(missing)}); run distill cache again to write them")
  return nearest
