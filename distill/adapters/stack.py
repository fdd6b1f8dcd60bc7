"""The ordered stack of adapters on a base, and its merging."""

import dataclasses
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from distill.adapters import edits
from distill.adapters.layout import EMBEDDING, HEAD, with_bias
from distill.adapters.peft import Adapter, read_adapter
from distill.errors import InputError
from distill.models import hf
from distill.models.config import DecoderConfig
from distill.tree import Params

MODES = ("sequential", "co-active")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
  """One adapter of a stack.

  Attributes:
    path: PEFT directory.
    weight: Factor of the change it makes.
    mode: 'sequential': made on top of those before it. 'co-active': made beside the one before it, for the same base.
      Deltas of plain LoRA add up to the same either way; see `edits` for what does not.
    name: By which a data source asks for it; the last part of the path unless given.
  """

  path: pathlib.Path
  weight: float = 1.0
  mode: str = "sequential"
  name: str = ""

  def __post_init__(self):
    if not self.name:
      object.__setattr__(self, "name", pathlib.Path(self.path).resolve().name)


Stack = tuple[Entry, ...]
# An entry with what was read from its path.
Applied = tuple[Entry, Adapter]


def stack_of(paths: Sequence[str | os.PathLike[str]]) -> Stack:
  """The adapters in the order given, each at weight 1."""
  return tuple(Entry(path=pathlib.Path(path)) for path in paths)


def read_stack(path: pathlib.Path) -> Stack:
  """The stack of a JSON file: {"adapters": [{"path", "weight": 1.0, "mode": "sequential", "name"}]}.

  Paths are relative to the file.

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
    if unknown := set(fields) - {"path", "weight", "mode", "name"}:
      raise InputError(f"{where}.{min(unknown)}: unknown key; an adapter has path, weight, mode and name")
    weight, mode, name = fields.get("weight", 1.0), fields.get("mode", "sequential"), fields.get("name", "")
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not abs(weight) < 1e30:
      raise InputError(f"{where}.weight: {weight!r} is not a finite number")
    if mode not in MODES:
      raise InputError(f"{where}.mode: {mode!r}; use one of {', '.join(MODES)}")
    if not isinstance(name, str):
      raise InputError(f"{where}.name: {name!r} is not a string")
    entries.append(Entry(path=path.parent / fields["path"], weight=float(weight), mode=mode, name=name))
  return tuple(entries)


def read_adapters(stack: Stack, *, config: DecoderConfig) -> tuple[Applied, ...]:
  """Every entry with its adapter.

  Raises:
    InputError: An adapter cannot be read or belongs to another model.
  """
  return tuple((entry, read_adapter(entry.path, config=config)) for entry in stack)


def merge(params: Mapping[str, Any], *, stack: Stack, config: DecoderConfig) -> tuple[DecoderConfig, Params]:
  """Architecture and canonical parameters with every adapter applied in float32, in order.

  The architecture changes where an adapter made it another one: a tied head that became its own, more tokens, a bias.
  What no adapter touches keeps its dtype.

  Raises:
    InputError: An adapter cannot be read or belongs to another model.
  """
  return merge_adapters(params, adapters=read_adapters(stack, config=config), config=config)


def merge_adapters(
  params: Mapping[str, Any], *, adapters: Sequence[Applied], config: DecoderConfig
) -> tuple[DecoderConfig, Params]:
  """The same, of adapters that were read."""
  grown, params = prepare(params, adapters=adapters, config=config)
  merged = apply(params, adapters=adapters)
  grown = with_vocabulary(grown, merged, where=", ".join(str(adapter.path) for _, adapter in adapters))
  if config.tie_embeddings and HEAD in merged and np.array_equal(merged[EMBEDDING], merged[HEAD].T):
    grown = dataclasses.replace(grown, tie_embeddings=True)
    del merged[HEAD]
  return grown, merged


def prepare(
  params: Mapping[str, Any], *, adapters: Sequence[Applied], config: DecoderConfig
) -> tuple[DecoderConfig, Params]:
  """The same model with all parameters that the adapters edit: biases of zero, and a tied head as one of its own."""
  names = {name for _, adapter in adapters for name, _ in adapter.edits}
  grown, ready = config, dict(params)
  if config.tie_embeddings and names & {EMBEDDING, HEAD}:
    grown = dataclasses.replace(grown, tie_embeddings=False)
    ready[HEAD] = np.asarray(ready[EMBEDDING]).T
  for name in sorted(names - set(ready)):
    grown = with_bias(grown, name)
  if names - set(ready):
    ready |= {name: np.zeros(shape, np.float32) for name, shape in hf.shapes(grown).items() if name not in ready}
  return grown, ready


def with_vocabulary(config: DecoderConfig, params: Mapping[str, Any], *, where: str) -> DecoderConfig:
  """The architecture with as many tokens as the embedding has.

  Raises:
    InputError: The head has another number of them.
  """
  count = params[EMBEDDING].shape[0]
  if HEAD in params and params[HEAD].shape[1] != count:
    raise InputError(
      f"{where}: embedding of {count} tokens, head of {params[HEAD].shape[1]}; store both in the adapter"
    )
  return config if count == config.vocab_size else dataclasses.replace(config, vocab_size=count)


def apply(params: Mapping[str, Any], *, adapters: Sequence[Applied], only: Collection[str] | None = None) -> Params:
  """Parameters after the adapters, of those in `only` if it is given; all that they edit must be there."""
  current = dict(params)
  base = dict(current)
  for entry, adapter in adapters:
    if entry.mode == "sequential":
      base = dict(current)
    for name, edit in adapter.edits:
      if only is not None and name not in only:
        continue
      current[name] = _applied(edit, current[name], base[name], entry, adapter, name)
      if getattr(edit, "underlies", False):
        base[name] = edits.apply(edit, base[name], base=base[name], weight=entry.weight)
  return current


def _applied(edit, current, base, entry, adapter, name) -> np.ndarray:
  if isinstance(edit, edits.LowRank) and current.shape != (edit.a.shape[0], edit.b.shape[1]):
    raise InputError(
      f"{adapter.path}: {name} is adapted as {(edit.a.shape[0], edit.b.shape[1])}, the adapters before it made it "
      f"{current.shape}; reorder the stack"
    )
  if isinstance(edit, edits.Rows) and edit.indices.size and edit.indices.max() >= current.shape[edit.axis]:
    raise InputError(f"{adapter.path}: token {edit.indices.max()} is not in the {current.shape} of {name}")
  if base.shape != current.shape:
    base = current  # An adapter beside it has changed the number of tokens.
  return edits.apply(edit, current, base=base, weight=entry.weight)
