"""Reads the stack, the ordered list of adapters on a base model."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

from distill.adapters.peft import Adapter, read_adapter
from distill.checkpoints.hub import locate
from distill.errors import InputError
from distill.files.json_file import read_json
from distill.models.config import DecoderConfig

MODES = ("sequential", "co-active")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackEntry:
  """One adapter of a stack.

  Attributes:
    path: PEFT directory.
    weight: Factor that multiplies the adapter's change; 1 by default.
    mode: 'sequential': trained on top of the adapters before it. 'co-active': trained on the same base as the adapter
      before it. Both modes give the same result for LoRA without DoRA; `distill/adapters/edits.py` describes where
      other changes differ.
    name: Name by which a data source selects the adapter; by default the last part of the path.
  """

  path: pathlib.Path
  weight: float = 1.0
  mode: str = "sequential"
  name: str = ""

  def __post_init__(self):
    if not self.name:
      object.__setattr__(self, "name", pathlib.Path(self.path).resolve().name)


Stack = tuple[StackEntry, ...]
# An entry with the adapter that its directory holds.
StackedAdapter = tuple[StackEntry, Adapter]


def stack_of(paths: Sequence[str | os.PathLike[str]]) -> Stack:
  """Returns the stack of the adapters at `paths`, directories or hub names, each with weight 1.

  All have the mode 'sequential': each was trained on top of those before it.
  """
  return tuple(StackEntry(path=locate(path), name=_called(path)) for path in paths)


def _called(path: str | os.PathLike[str]) -> str:
  """Returns an adapter's default name: the last part of its path or hub name; '' for paths such as '..'."""
  name = pathlib.PurePath(str(path).partition("@")[0]).name
  return "" if name in ("", ".", "..") else name


def read_stack(path: pathlib.Path) -> Stack:
  """Reads a stack from a JSON file: {"adapters": [{"path", "weight": 1.0, "mode": "sequential", "name"}]}.

  Paths are relative to the file; `StackEntry` describes the keys.

  Raises:
    InputError: The file is missing or malformed, or a key or mode is unknown.
  """
  path = pathlib.Path(path)
  values = read_json(path)
  adapters = values.get("adapters")
  if set(values) != {"adapters"} or not isinstance(adapters, list):
    raise InputError(f'{path}: the file must hold {{"adapters": [{{"path": …, "weight": 1.0, "mode": "sequential"}}]}}')
  entries = []
  for index, fields in enumerate(adapters):
    where = f"{path}: adapters[{index}]"
    if not isinstance(fields, dict) or not isinstance(fields.get("path"), str):
      raise InputError(f"{where}.path: missing; give a PEFT directory")
    if not fields["path"].isprintable():
      raise InputError(f"{where}.path: {ascii(fields['path'])} is not a path; give a PEFT directory")
    if unknown := set(fields) - {"path", "weight", "mode", "name"}:
      raise InputError(f"{where}.{min(unknown)}: unknown key; the keys of an adapter are path, weight, mode and name")
    weight, mode, name = fields.get("weight", 1.0), fields.get("mode", "sequential"), fields.get("name", "")
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not abs(weight) < 1e30:
      raise InputError(f"{where}.weight: {weight!r} is not a number of magnitude below 1e30; give a factor such as 1.0")
    if mode not in MODES:
      raise InputError(f"{where}.mode: {mode!r} is not a mode; use one of {', '.join(MODES)}")
    if not isinstance(name, str):
      raise InputError(f"{where}.name: {name!r} is not a string; give a name in quotes")
    found, name = locate(fields["path"], relative_to=path.parent), name or _called(fields["path"])
    entries.append(StackEntry(path=found, weight=float(weight), mode=mode, name=name))
  return tuple(entries)


def read_adapters(stack: Stack, *, config: DecoderConfig) -> tuple[StackedAdapter, ...]:
  """Reads the adapter of every entry of a stack; returns pairs (entry, adapter) in the order of the stack.

  Raises:
    InputError: An adapter cannot be read or belongs to another model.
  """
  return tuple((entry, read_adapter(entry.path, config=config)) for entry in stack)
