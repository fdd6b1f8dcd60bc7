"""Reads untrusted JSON. Each value has the type that the caller asks for, else an error names the file and the key."""

import json
import math
import os
import pathlib
import stat
from typing import Any

from distill.errors import InputError

_MAX_JSON = 100 * 2**20
_MAX_DEPTH = 50
_LARGEST = 2**31 - 1


def regular(path: pathlib.Path, *, hint: str) -> int:
  """Checks that a path is an ordinary readable file and returns its size in bytes.

  A symbolic link must point into its own directory, except in the cache of the Hugging Face hub: there a file below
  `snapshots` may link to `blobs`.

  Args:
    path: The file.
    hint: What the user can do if the file is missing; error messages end with it.

  Raises:
    InputError: The file is missing, is a directory, a device or a pipe, cannot be read, or links to another directory.
  """
  try:
    found = path.stat()
    real, home = path.resolve(strict=True), path.parent.resolve(strict=True)
  except (FileNotFoundError, NotADirectoryError) as error:
    raise InputError(f"{path}: no such file; {hint}") from error
  except (OSError, ValueError, RuntimeError) as error:
    raise InputError(f"{str(path)!r}: cannot be read ({error}); {hint}") from error
  if not stat.S_ISREG(found.st_mode):
    raise InputError(f"{path}: is not a plain file; {hint}")
  blobs = {one.parent.parent / "blobs" for one in (home, *home.parents) if one.parent.name == "snapshots"}
  if real.parent not in blobs and not real.is_relative_to(home):
    raise InputError(f"{path}: is a link to {real}, outside its directory; replace the link by a copy of the file")
  if not os.access(path, os.R_OK):
    raise InputError(f"{path}: cannot be read (permission denied); {hint}")
  return found.st_size


def parse(text: bytes, *, where: str) -> dict[str, Any]:
  """Parses a JSON object; refuses duplicate keys, NaN, and nesting deeper than 50 levels.

  Infinity is not JSON, but transformers 4 writes it in lists called time_step_limit. It is accepted only there.

  Raises:
    InputError: The text is not such an object; the message begins with `where`, the name of the file.
  """

  def unique(pairs):
    values = dict(pairs)
    if len(values) != len(pairs):
      names = [name for name, _ in pairs]
      twice = next(name for name in names if names.count(name) > 1)
      raise InputError(f"{where}: the key {twice!r} appears twice; fetch the file again")
    limits = values.get("time_step_limit")
    if isinstance(limits, list):
      del loose[: sum(one is infinity for one in limits)]
    return values

  def refuse(word: str):
    raise InputError(f"{where}: holds {word}, which is not JSON; write a number instead")

  infinity, loose = float("inf"), []

  def constant(word: str) -> float:
    if word != "Infinity":
      refuse(word)
    loose.append(word)
    return infinity

  try:
    values = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    if loose:
      refuse(loose[0])
  except InputError:
    raise
  except RecursionError as error:
    raise InputError(f"{where}: cannot be read as JSON (nested too deeply); fetch the file again") from error
  except json.JSONDecodeError as error:
    place = f"line {error.lineno}, column {error.colno}"
    raise InputError(
      f"{where}: cannot be read as JSON ({error.msg}); correct it at {place}, or fetch it again"
    ) from error
  except ValueError as error:
    raise InputError(f"{where}: cannot be read as JSON ({error}); fetch the file again") from error
  if not isinstance(values, dict):
    raise InputError(f"{where}: expected a JSON object; correct the file, or fetch it again")
  level: list[Any] = [values]
  for _ in range(_MAX_DEPTH):
    inner = (one.values() if isinstance(one, dict) else one for one in level)
    level = [one for many in inner for one in many if isinstance(one, dict | list)]
  if level:
    raise InputError(f"{where}: cannot be read as JSON (nested too deeply); fetch the file again")
  return values


def read_json(path: pathlib.Path, *, hint: str = "give a directory in the Hugging Face format") -> dict[str, Any]:
  """Reads the JSON object in a file; `hint` tells the user what to do if the file is missing.

  Raises:
    InputError: The file is missing, larger than 100 MiB, or not valid JSON (see `parse`).
  """
  path = pathlib.Path(path)
  if (size := regular(path, hint=hint)) > _MAX_JSON:
    raise InputError(
      f"{path}: has {size:,} bytes, but a JSON file may have {_MAX_JSON:,} at most; fetch the file again"
    )
  try:
    text = path.read_bytes()
  except OSError as error:
    raise InputError(f"{path}: cannot be read ({error.strerror}); fetch the file again") from error
  return parse(text, where=str(path))


def integer(value: Any, *, where: str, low: int = 1, high: int = _LARGEST) -> int:
  """Returns `value` as an int.

  Args:
    value: An int, or a float that is whole.
    where: File and key, for the message.
    low: The smallest allowed value.
    high: The largest allowed value.

  Raises:
    InputError: `value` is not a whole number, or out of range.
  """
  whole = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value) and value == int(value))
  if isinstance(value, bool) or not whole or not low <= value <= high:
    raise InputError(f"{where} = {_short(value)}: expected a whole number from {low} to {high}")
  return int(value)


def number(value: Any, *, where: str, low: float = -math.inf, high: float = math.inf) -> float:
  """Returns `value` as a float.

  Args:
    value: A finite int or float.
    where: File and key, for the message.
    low: The smallest allowed value.
    high: The largest allowed value.

  Raises:
    InputError: `value` is not a number, not finite, or out of range.
  """
  try:
    found = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
  except OverflowError:
    found = math.inf
  if not math.isfinite(found) or not low <= found <= high:
    limits = "" if low == -math.inf and high == math.inf else f" from {low:g} to {high:g}"
    raise InputError(f"{where} = {_short(value)}: expected a finite number{limits}")
  return found


def flag(value: Any, *, where: str) -> bool:
  """Returns `value`, which must be a bool; `where` names file and key in the error message.

  Raises:
    InputError: `value` is not a bool.
  """
  if not isinstance(value, bool):
    raise InputError(f"{where} = {_short(value)}: expected true or false")
  return value


def _short(value: Any) -> str:
  try:
    text = repr(value)
  except (ValueError, RecursionError):  # More digits than Python prints, or deep nesting.
    return f"a huge {type(value).__name__}"
  return text if len(text) <= 60 else f"{text[:57]}…"
