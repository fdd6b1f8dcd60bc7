"""Reads and writes safetensors, one file or several with an index. Headers of untrusted files are checked in full."""

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from distill.errors import InputError
from distill.files.json_file import parse, read_json, regular
from distill.files.tensors import Pending, Stored, TensorReader, finite

# In the order of the reference writer, so that a file that it wrote is reproduced byte by byte.
DTYPES: Mapping[str, np.dtype] = {
  "F64": np.dtype(np.float64),
  "I64": np.dtype(np.int64),
  "U64": np.dtype(np.uint64),
  "F32": np.dtype(np.float32),
  "U32": np.dtype(np.uint32),
  "I32": np.dtype(np.int32),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F16": np.dtype(np.float16),
  "U16": np.dtype(np.uint16),
  "I16": np.dtype(np.int16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "I8": np.dtype(np.int8),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = {name: i for i, name in enumerate(DTYPES)}
_FILE = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)
_MAX_HEADER = 100 * 2**20
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.npz", "*.h5", "*.msgpack")
_FETCH_AGAIN = "fetch the file again"


def read(directory: pathlib.Path, *, stem: str) -> dict[str, np.ndarray]:
  """Reads all tensors of `{stem}.safetensors`, or of the files that `{stem}.safetensors.index.json` lists.

  Raises:
    InputError: A file is missing or damaged, the index contradicts the files, or a tensor holds values that are not
      finite.
  """
  reader = TensorReader()
  tensors = {name: reader.read(one) for name, one in stored(directory, stem=stem).items()}
  for name, value in tensors.items():
    if not finite(value):
      raise InputError(f"{directory}: tensor {name} holds values that are not finite; fetch the damaged weights again")
  return tensors


def header(directory: pathlib.Path, *, stem: str) -> dict[str, tuple[str, tuple[int, ...]]]:
  """Returns name -> (dtype as files name it, such as 'BF16', shape) of every tensor; reads only the headers."""
  return {name: (_NAMES[one.dtype], one.shape) for name, one in stored(directory, stem=stem).items()}


def stored(directory: pathlib.Path, *, stem: str) -> dict[str, Stored]:
  """Returns name -> location of every tensor. Checks headers, file sizes and, if there is one, the index.

  Raises:
    InputError: A file is missing, truncated or damaged, two tensors have one name, or the index contradicts the files.
  """
  directory = pathlib.Path(directory)
  index, single = directory / f"{stem}.safetensors.index.json", directory / f"{stem}.safetensors"
  if not os.path.lexists(index):
    if not os.path.lexists(single) and (pickles := sorted(p.name for glob in _PICKLES for p in directory.glob(glob))):
      unsafe = pickles[0]
      raise InputError(
        f"{single}: no such file; {unsafe} is never opened, as it may hold code; convert it to safetensors"
      )
    return _header(single)
  where = read_json(index).get("weight_map")
  if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
    raise InputError(f"{index}: has no weight_map from tensor names to file names; {_FETCH_AGAIN}")
  found: dict[str, Stored] = {}
  for name in sorted(set(where.values())):
    if not _FILE.fullmatch(name):
      raise InputError(f"{index}: weight_map names {name!r}; expected a *.safetensors file in the same directory")
    for tensor, one in _header(directory / name, hint=f"fetch this file, too, which {index.name} names").items():
      if tensor in found:
        raise InputError(f"{directory / name}: tensor {tensor} is in {found[tensor].path.name} too; {_FETCH_AGAIN}")
      found[tensor] = one
  places = {tensor: one.path.name for tensor, one in found.items()}
  if places != where:
    wrong = min(key for key in {*places, *where} if places.get(key) != where.get(key))
    raise InputError(f"{index}: tensor {wrong!r} is not where the index says; {_FETCH_AGAIN}")
  return found


def digest(directory: pathlib.Path, *, stem: str, settings: str) -> str:
  """Returns one SHA-256 over a JSON file and the safetensors files next to it; files are read in parallel.

  Args:
    directory: The directory of all these files.
    stem: Name of the safetensors files, without `.safetensors`.
    settings: Name of the JSON file.

  Raises:
    InputError: A file is missing or damaged, or the index contradicts the safetensors files.
  """
  directory = pathlib.Path(directory)
  regular(directory / settings, hint="put the file that describes the tensors next to them")
  files = [directory / settings, *sorted({one.path for one in stored(directory, stem=stem).values()})]
  with concurrent.futures.ThreadPoolExecutor() as threads:
    sums = list(threads.map(_sum, files))
  return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def _sum(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _header(path: pathlib.Path, *, hint: str = "weights must be in the safetensors format") -> dict[str, Stored]:
  size = regular(path, hint=hint)
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    if length > _MAX_HEADER:
      raise InputError(
        f"{path}: is damaged or not a safetensors file (its header has {length:,} bytes); {_FETCH_AGAIN}"
      )
    text = file.read(length) if size >= 8 else b""
  if len(text) != length or not text.startswith(b"{"):
    raise InputError(f"{path}: is damaged or cut short (it has no readable header); {_FETCH_AGAIN}")
  entries = parse(text, where=f"{path}: damaged header")
  metadata = entries.pop("__metadata__", {})
  if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
    raise InputError(f"{path}: __metadata__ = {str(metadata)[:60]}; expected an object of strings; {_FETCH_AGAIN}")
  found = {name: _entry(path, name, entry) for name, entry in entries.items()}
  at = 0
  for name, (begin, one) in sorted(found.items(), key=lambda item: (item[1][0], item[1][1].nbytes)):
    if begin != at:
      fault = "overlaps the one before it" if begin < at else "leaves a hole before it"
      raise InputError(f"{path}: the file is damaged: tensor {name!r} {fault}; {_FETCH_AGAIN}")
    at += one.nbytes
  if 8 + length + at != size:
    expected = 8 + length + at
    fault = "cut short" if expected > size else "too long"
    raise InputError(
      f"{path}: is {fault}: it has {size:,} bytes, but its header describes {expected:,}; {_FETCH_AGAIN}"
    )
  return {name: dataclasses.replace(one, offset=8 + length + begin) for name, (begin, one) in found.items()}


def _entry(path: pathlib.Path, name: str, entry: Any) -> tuple[int, Stored]:
  """Reads one tensor's entry in the header of a file.

  Returns:
    (offset of the tensor's first byte from the end of the header, the tensor with `offset` 0 for the caller to set).

  Raises:
    InputError: The entry is damaged, or its dtype is not supported.
  """
  where = f"{path}: tensor {name!r}"
  if not name or len(name) > 1000 or not name.isprintable() or "/" in name or "\\" in name:
    raise InputError(f"{where[:200]}: this is not a valid tensor name; {_FETCH_AGAIN}")
  if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
    raise InputError(f"{where}: expected dtype, shape and data_offsets in the header; {_FETCH_AGAIN}")
  dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
  if not isinstance(dtype, str) or dtype not in DTYPES:
    raise InputError(f"{where}: dtype {str(dtype)[:60]!r} is not supported; expected one of {', '.join(DTYPES)}")
  for key, value in (("shape", shape), ("data_offsets", offsets)):
    if not isinstance(value, list) or not all(type(one) is int and 0 <= one < 2**63 for one in value):
      raise InputError(f"{where}: {key} {str(value)[:60]} must be a list of whole numbers, 0 or larger; {_FETCH_AGAIN}")
  if len(shape) > 8 or len(offsets) != 2:
    raise InputError(
      f"{where}: has {len(shape)} dimensions and {len(offsets)} data_offsets; expected at most 8 dimensions and 2 "
      f"offsets; {_FETCH_AGAIN}"
    )
  size = math.prod(shape) * DTYPES[dtype].itemsize
  if offsets[1] - offsets[0] != size:
    stored_bytes = offsets[1] - offsets[0]
    raise InputError(
      f"{where}: data_offsets cover {stored_bytes:,} bytes, but its shape needs {size:,}; {_FETCH_AGAIN}"
    )
  # If one dimension is 0, the file's size does not bound the others.
  if math.prod(one for one in shape if one) >= 2**48:
    raise InputError(f"{where}: shape {str(shape)[:60]} is beyond what arrays can have; {_FETCH_AGAIN}")
  return offsets[0], Stored(path=path, dtype=DTYPES[dtype], shape=tuple(shape), offset=0)


def write(
  directory: pathlib.Path,
  tensors: Mapping[str, np.ndarray] | Mapping[str, Pending],
  *,
  stem: str,
  max_file_bytes: int = 5 * 10**9,
) -> None:
  """Writes tensors to `{stem}.safetensors`, or to several files and an index if larger than `max_file_bytes`.

  Args:
    directory: An existing directory.
    tensors: Arrays, or `Pending` ones, of which one is in memory at a time.
    stem: File name without `.safetensors`.
    max_file_bytes: Largest size of one file in bytes; more tensors go into further files.
  """
  waiting = {name: x if isinstance(x, Pending) else _pending(x) for name, x in tensors.items()}
  parts: list[dict[str, Pending]] = [{}]
  size = 0
  for name in sorted(waiting):
    if parts[-1] and size + waiting[name].nbytes > max_file_bytes:
      parts.append({})
      size = 0
    parts[-1][name] = waiting[name]
    size += waiting[name].nbytes
  if len(parts) == 1:
    _write_file(directory / f"{stem}.safetensors", parts[0])
    return
  names = [f"{stem}-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
  for file, part in zip(names, parts, strict=True):
    _write_file(directory / file, part)
  where = {tensor: file for file, part in zip(names, parts, strict=True) for tensor in part}
  total = sum(x.nbytes for x in waiting.values())
  index = {"metadata": {"total_size": total}, "weight_map": where}
  (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _pending(value: np.ndarray) -> Pending:
  return Pending(shape=value.shape, dtype=value.dtype, make=lambda: value)


def _write_file(path: pathlib.Path, tensors: Mapping[str, Pending]) -> None:
  order = sorted(tensors, key=lambda name: (_ORDER[_NAMES[tensors[name].dtype]], name))
  entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  at = 0
  for name in order:
    one = tensors[name]
    entries[name] = {"dtype": _NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [at, at + one.nbytes]}
    at += one.nbytes
  text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
  text += b" " * (-len(text) % 8)
  with path.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
      value = np.asarray(tensors[name].make(), order="C")
      assert (value.shape, value.dtype) == (tensors[name].shape, tensors[name].dtype), name
      file.write(value.reshape(-1).view(np.uint8).data)
