"""safetensors, one file or several with an index; files from strangers are checked before they are believed."""

import json
import pathlib
import re
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from distill.errors import InputError

_NAME = re.compile(r"[\w.-]+\.safetensors")
_FLOATS = (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)


def read(directory: pathlib.Path, *, stem: str) -> dict[str, np.ndarray]:
  """All tensors of `{stem}.safetensors`, or of the files that `{stem}.safetensors.index.json` names.

  Raises:
    InputError: Missing, truncated or damaged files, duplicate names, tensors that are not where the index says, or
      values that are not finite.
  """
  tensors: dict[str, np.ndarray] = {}
  for path in files(directory, stem=stem):
    try:
      with safetensors.safe_open(path, framework="np") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
          tensors[name] = file.get_tensor(name)
    except (safetensors.SafetensorError, OSError, TypeError) as error:
      raise InputError(f"{path}: damaged or cut short ({error}); fetch the file again") from error
  for name, value in tensors.items():
    if value.dtype.type in _FLOATS and not np.isfinite(value.astype(np.float32)).all():
      raise InputError(f"{directory}: tensor {name} holds values that are not finite; the weights are damaged")
  return tensors


def header(directory: pathlib.Path, *, stem: str) -> dict[str, tuple[str, tuple[int, ...]]]:
  """(dtype, shape) of every tensor, without reading any."""
  found = {}
  for path in files(directory, stem=stem):
    for name, entry in _header(path).items():
      found[name] = (entry["dtype"], tuple(entry["shape"]))
  return found


def files(directory: pathlib.Path, *, stem: str) -> list[pathlib.Path]:
  """The files that hold the tensors, checked against the index where there is one."""
  directory = pathlib.Path(directory)
  index, single = directory / f"{stem}.safetensors.index.json", directory / f"{stem}.safetensors"
  if not index.is_file():
    if not single.is_file():
      raise InputError(f"{single}: no such file; weights must be in the safetensors format")
    _header(single)
    return [single]
  try:
    where: dict[str, str] = json.loads(index.read_text())["weight_map"]
    names = sorted(set(where.values()))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise InputError(f"{index}: no weight_map of tensor names to files ({error})") from error
  found: dict[str, str] = {}
  for name in names:
    if not _NAME.fullmatch(name):
      raise InputError(f"{index}: weight_map names {name!r}; expected a plain *.safetensors file beside it")
    if not (directory / name).is_file():
      raise InputError(f"{directory / name}: no such file, but {index.name} names it")
    for tensor in _header(directory / name):
      if tensor in found:
        raise InputError(f"{directory / name}: tensor {tensor} is in {found[tensor]} too")
      found[tensor] = name
  if found != where:
    wrong = min(key for key in {*found, *where} if found.get(key) != where.get(key))
    raise InputError(f"{index}: tensor {wrong} is not where the index says")
  return [directory / name for name in names]


def _header(path: pathlib.Path) -> dict[str, Any]:
  def unique(pairs):
    if len({key for key, _ in pairs}) != len(pairs):
      raise InputError(f"{path}: a tensor name stands twice in the header; the file is not to be trusted")
    return dict(pairs)

  try:
    with path.open("rb") as file:
      (size,) = struct.unpack("<Q", file.read(8))
      if size > 100 * 2**20:
        raise InputError(f"{path}: header of {size} bytes; not a safetensors file")
      entries = json.loads(file.read(size), object_pairs_hook=unique)
  except InputError:
    raise
  except (OSError, ValueError, struct.error) as error:
    raise InputError(f"{path}: damaged or cut short (no readable header); fetch the file again") from error
  entries.pop("__metadata__", None)
  return entries


def write(
  directory: pathlib.Path, tensors: Mapping[str, np.ndarray], *, stem: str, max_file_bytes: int = 5 * 10**9
) -> None:
  """Writes `{stem}.safetensors`, or several files and an index when they would be larger than `max_file_bytes`."""
  parts: list[dict[str, np.ndarray]] = [{}]
  size = 0
  for name in sorted(tensors):
    if parts[-1] and size + tensors[name].nbytes > max_file_bytes:
      parts.append({})
      size = 0
    parts[-1][name] = tensors[name]
    size += tensors[name].nbytes
  if len(parts) == 1:
    safetensors.numpy.save_file(parts[0], directory / f"{stem}.safetensors", metadata={"format": "pt"})
    return
  names = [f"{stem}-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
  for file, part in zip(names, parts, strict=True):
    safetensors.numpy.save_file(part, directory / file, metadata={"format": "pt"})
  where = {tensor: file for file, part in zip(names, parts, strict=True) for tensor in part}
  total = sum(x.nbytes for x in tensors.values())
  index = {"metadata": {"total_size": total}, "weight_map": where}
  (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
