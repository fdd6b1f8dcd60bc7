"""The ordered stack of adapters on a base, and its merging."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill.adapters.peft import Factors, read_adapter
from distill.errors import InputError
from distill.models import hf
from distill.models.config import DecoderConfig
from distill.models.hub import locate
from distill.models.sharded import Edit
from distill.tree import Params

MODES = ("sequential", "co-active")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
  """One adapter of a stack.

  Attributes:
    path: PEFT directory.
    weight: Factor of its delta.
    mode: 'sequential' (made on top of those before it) or 'co-active' (made beside them); deltas of plain LoRA add
      up to the same either way.
  """

  path: pathlib.Path
  weight: float = 1.0
  mode: str = "sequential"


Stack = tuple[Entry, ...]


def stack_of(paths: Sequence[str | os.PathLike[str]]) -> Stack:
  """The adapters in the order given, each at weight 1."""
  return tuple(Entry(path=locate(path)) for path in paths)


def read_stack(path: pathlib.Path) -> Stack:
  """The stack of a JSON file: {"adapters": [{"path", "weight": 1.0, "mode": "sequential"}]}, paths relative to it.

  Raises:
    InputError: Missing or malformed file, unknown key or mode.
  """
  path = pathlib.Path(path)
  values = hf.read_json(path)
  adapters = values.get("adapters")
  if set(values) != {"adapters"} or not isinstance(adapters, list):
    raise InputError(f'{path}: expected {{"adapters": [{{"path": …, "weight": 1.0, "mode": "sequential"}}]}}')
  entries = []
  for index, fields in enumerate(adapters):
    where = f"{path}: adapters[{index}]"
    if not isinstance(fields, dict) or not isinstance(fields.get("path"), str):
      raise InputError(f"{where}.path: missing; give a PEFT directory")
    if unknown := set(fields) - {"path", "weight", "mode"}:
      raise InputError(f"{where}.{min(unknown)}: unknown key; an adapter has path, weight and mode")
    weight, mode = fields.get("weight", 1.0), fields.get("mode", "sequential")
    if not isinstance(weight, int | float) or isinstance(weight, bool):
      raise InputError(f"{where}.weight: {weight!r} is not a number")
    if mode not in MODES:
      raise InputError(f"{where}.mode: {mode!r}; use one of {', '.join(MODES)}")
    entries.append(Entry(path=locate(fields["path"], beside=path.parent), weight=float(weight), mode=mode))
  return tuple(entries)


def merge(params: Mapping[str, Any], *, stack: Stack, config: DecoderConfig) -> Params:
  """Canonical parameters with every adapter's delta added in float32, in order.

  Kernels that no adapter touches keep their dtype.

  Raises:
    InputError: An adapter cannot be read or belongs to another model.
  """
  merged = dict(params)
  for entry in stack:
    for name, pair in read_adapter(entry.path, config=config).factors.items():
      delta = np.float32(entry.weight * pair.scale) * (pair.a @ pair.b)
      merged[name] = np.asarray(merged[name], np.float32) + delta
  return merged


def edits(stack: Stack, *, config: DecoderConfig) -> dict[str, Edit]:
  """For `sharded.load`: every kernel's deltas, added in float32 and in order to its blocks as they are read.

  Raises:
    InputError: An adapter cannot be read or belongs to another model.
  """
  deltas: dict[str, list[tuple[np.float32, Factors]]] = {}
  for entry in stack:
    for name, pair in read_adapter(entry.path, config=config).factors.items():
      deltas.setdefault(name, []).append((np.float32(entry.weight * pair.scale), pair))

  def edit(pairs):
    def apply(value, block, read):
      rows, columns = block
      for scale, pair in pairs:
        value = value + scale * (pair.a[rows] @ pair.b[:, columns])
      return value

    return apply

  return {name: edit(pairs) for name, pairs in deltas.items()}
