"""A teacher's knowledge on disk, aligned by row with token stores: read at random, each row with its checksum.

A cache is a directory with a section for each pair of a token store and a teacher. A section has a manifest that says
all it depends on, and shards in the safetensors format, each with as many rows.
"""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Int

from distill.errors import InputError
from distill.files import safetensors_files
from distill.files.json_file import read_json
from distill.files.replace import replace_file
from distill.teachers.targets import Targets, targets
from distill.types import NO_CAPTURE, Capture, SparseSignal

FORMAT = 1
MANIFEST = "manifest.json"
_SHARD_BYTES = 64 * 2**20
_OPEN_SHARDS = 128
_AGAIN = "delete it and run distill cache again, which makes it anew"
# What a section is of, and what is said of one that is of another; in the order in which they are told.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
  """How rows of a section become bytes.

  Attributes:
    targets: What is kept of the distributions.
    length: Positions, T.
    bits: Of a token's id.
    layers: Layers whose outputs are kept, in bfloat16.
    mixers: Mixers whose outputs are.
    width: Of both.
  """

  targets: Targets
  length: int
  bits: int
  layers: tuple[int, ...]
  mixers: tuple[int, ...]
  width: int

  @property
  def nbytes(self) -> int:
    """Most bytes of a row."""
    states = 2 * self.width * (len(self.layers) + len(self.mixers))
    return int(self.length * (self.targets.bytes_a_token(self.bits) + states)) + 2

  def pack(self, kept: tuple[np.ndarray, ...], states: Sequence[np.ndarray]) -> bytes:
    """A row: outputs [T,D] of layers, of mixers, then the targets."""
    rounded = [np.asarray(state, ml_dtypes.bfloat16).view(np.uint16) for state in states]
    return b"".join(x.astype("<u2").tobytes() for x in rounded) + self.targets.pack(kept, bits=self.bits)

  def unpack(self, data: bytes, capture: Capture) -> SparseSignal:
    """Returns the row's target and the captured activations, all of which the section must hold."""
    many = self.length * self.width

    def state(place: int) -> Any:
      numbers = np.frombuffer(data, "<u2", many, offset=2 * many * place).astype(np.uint16)
      return numbers.view(ml_dtypes.bfloat16).reshape(self.length, self.width)

    after = 2 * many * (len(self.layers) + len(self.mixers))
    return SparseSignal(
      target=self.targets.unpack(data[after:], length=self.length, bits=self.bits),
      layers={one: state(self.layers.index(one)) for one in capture.layers},
      mixers={one: state(len(self.layers) + self.mixers.index(one)) for one in capture.mixers},
    )


class Section:
  """The rows of one token store under one teacher.

  Args:
    directory: That holds its manifest.
    pool: Shards that are open, of this and other sections; the least used are closed.

  Attributes:
    manifest: What the rows depend on.
    identity: Digest of the manifest.

  Raises:
    InputError: The manifest is missing, damaged or of another version.
  """

  def __init__(self, directory: pathlib.Path, *, pool: "Pool | None" = None):
    self.directory = pathlib.Path(directory)
    path = self.directory / MANIFEST
    self.manifest = read_json(path, hint="give a directory that distill cache has written")
    again = f"delete {self.directory} and run distill cache again"
    if self.manifest.get("format") != FORMAT or set(self.manifest) != _KEYS:
      raise InputError(f"{path}: damaged, or of another version; {again}")
    for key in _KEYS:
      value = self.manifest[key]
      if key in _COUNTS and not (type(value) is int and 0 < value < 2**48):
        raise InputError(f"{path}: {key}: {value!r} is not a number of anything; {again}")
      if key in _LISTS and not isinstance(value, list):
        raise InputError(f"{path}: {key}: {value!r} is not a list; {again}")
    self.identity = identity(self.manifest)
    self.rows = rows_of(self.manifest, where=str(path))
    self.shard_rows, self.count = self.manifest["shard_rows"], self.manifest["rows"]
    self._pool: Pool = collections.OrderedDict() if pool is None else pool

  def missing(self) -> list[int]:
    """Numbers of the shards that are not there yet."""
    return [n for n in range(-(-self.count // self.shard_rows)) if not self.path(n).is_file()]

  def path(self, shard: int) -> pathlib.Path:
    """Where a shard lies."""
    return self.directory / f"{shard:05}.safetensors"

  def bounds(self, shard: int) -> range:
    """The rows of a shard."""
    return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.count))

  def write(self, shard: int, rows: Sequence[bytes]) -> None:
    """Makes a shard of its packed rows; it is there whole, or not at all."""
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
    """Reads the targets of these rows and the captured activations, [B,T,…].

    Raises:
      InputError: A shard is missing, damaged, or of another cache.
    """
    found = [self.rows.unpack(self._read(int(row)), capture) for row in rows]
    return jax.tree.map(lambda *parts: np.stack(parts), *found)

  def _read(self, row: int) -> bytes:
    number, place = divmod(row, self.shard_rows)
    path = self.path(number)
    if path in self._pool:
      self._pool.move_to_end(path)
    else:
      self._pool[path] = _Shard(path, identity=self.identity, rows=len(self.bounds(number)))
      if len(self._pool) > _OPEN_SHARDS:
        self._pool.popitem(last=False)
    return self._pool[path].read(place, row)


class _Shard:
  """One file of a section, mapped into memory."""

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
      raise InputError(f"{path}: not a shard of {rows} rows; {_AGAIN}")
    mapped = np.memmap(path, np.uint8, "r")

    def tensor(name: str) -> np.ndarray:
      one = places[name]
      return mapped[one.offset : one.offset + one.nbytes].view(one.dtype)

    if tensor("identity").tobytes().hex() != identity:
      raise InputError(f"{path}: of another cache than {MANIFEST} beside it, or damaged; {_AGAIN}")
    self._rows, self._ends, self._sums = tensor("rows"), np.array(tensor("ends")), np.array(tensor("sums"))

  def read(self, place: int, row: int) -> bytes:
    """The bytes of the row at `place`, which is number `row` of the store."""
    begin, end = int(self._ends[place - 1]) if place else 0, int(self._ends[place])
    data = self._rows[begin:end].tobytes() if begin <= end <= len(self._rows) else b""
    if _sum(data, row) != int(self._sums[place]):
      raise InputError(f"{self._path}: row {row} of the store is damaged, its checksum differs; {_AGAIN}")
    return data


Pool = collections.OrderedDict[pathlib.Path, _Shard]


def _sum(data: bytes, row: int) -> int:
  """Checksum of a row at its place, so that it is not taken for another."""
  return zlib.crc32(data, row & 0xFFFFFFFF)


def identity(manifest: Mapping[str, Any]) -> str:
  """Digest of a manifest."""
  return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def rows_of(manifest: Mapping[str, Any], *, where: str) -> Rows:
  """How the rows that a manifest describes are packed.

  Raises:
    InputError: It describes targets that are none.
  """
  vocab = int(manifest["vocab_size"])
  return Rows(
    targets=targets(manifest, where=where, vocab=vocab),
    length=int(manifest["length"]),
    bits=max(1, (vocab - 1).bit_length()),
    layers=tuple(map(int, manifest["layers"])),
    mixers=tuple(map(int, manifest["mixers"])),
    width=int(manifest["width"]),
  )


def shard_rows(rows: Rows, *, batch_size: int) -> int:
  """Rows a shard: as many batches as take some 64 MiB, at least one."""
  return batch_size * max(1, _SHARD_BYTES // (rows.nbytes * batch_size))


def claim(directory: pathlib.Path, manifest: Mapping[str, Any]) -> Section:
  """The section for `manifest` in the cache `directory`, begun if it is not there.

  Raises:
    InputError: There is one of the same rows and teacher with other settings, or the directory cannot be written.
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
    raise InputError(f"{directory}: cannot be written ({error.strerror}); name another --workdir") from error
  section = Section(target)
  if section.identity != identity(manifest):
    key = next(key for key in sorted(_KEYS) if section.manifest[key] != manifest[key])
    raise InputError(
      f"{target / MANIFEST}: {key} is {section.manifest[key]}, this configuration's {manifest[key]}; "
      "name another --workdir, or delete this section"
    )
  return section


def sections(directory: str | os.PathLike[str]) -> list[Section]:
  """All sections of a cache, which share what they hold open.

  Raises:
    InputError: There are none, or a manifest is damaged.
  """
  pool: Pool = collections.OrderedDict()
  found = [Section(path.parent, pool=pool) for path in sorted(pathlib.Path(directory).glob(f"*/{MANIFEST}"))]
  if not found:
    raise InputError(f"config.teacher.cache: nothing in {directory}; run distill cache with --workdir={directory}")
  return found


def find(sections: Sequence[Section], subject: Mapping[str, Any], *, what: str) -> Section:
  """The whole section of a cache that is of `subject`: the keys of `SUBJECT` that are known.

  Args:
    sections: Of the cache.
    subject: What the section has to be of.
    what: Whose rows they are, for messages.

  Raises:
    InputError: None is; the message says in what the nearest differs. Or it lacks shards.
  """

  def wrong(section: Section) -> list[str]:
    return [key for key in SUBJECT if key in subject and section.manifest[key] != subject[key]]

  nearest = min(sections, key=lambda section: (len(wrong(section)), [SUBJECT[key] for key in wrong(section)]))
  if keys := wrong(nearest):
    raise InputError(
      f"{nearest.directory / MANIFEST}: {keys[0]}: of {SUBJECT[keys[0]]}, and nothing nearer is cached for {what}; "
      "run distill cache with this configuration"
    )
  if [one for one in sections if not wrong(one)] != [nearest]:
    raise InputError(
      f"config.teacher.cache: {nearest.directory.parent} has {what} of several teachers; set config.teacher.model"
    )
  if missing := nearest.missing():
    raise InputError(
      f"{nearest.path(missing[0])}: missing, {len(missing)} shards in all; run distill cache again to finish"
    )
  return nearest
