"""A base with its stack merged, or beside it by route, from the base's files straight onto the mesh."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from distill.adapters import live
from distill.adapters.edits import LowRank
from distill.adapters.peft import Adapter
from distill.adapters.stack import Applied, apply, edited, prepare, settle
from distill.models import hf, sharded
from distill.models.blocks import Reader
from distill.models.config import DecoderConfig
from distill.models.decoder import Decoder
from distill.models.sources import Block
from distill.parallel.together import together
from distill.tree import Params


class Checkpoint(Mapping[str, np.ndarray]):
  """The canonical parameters of a model directory, each read when it is asked for."""

  def __init__(self, directory: pathlib.Path):
    self.config, self._sources = hf.sources(directory)

  def __getitem__(self, name: str) -> np.ndarray:
    with Reader() as reader:
      return self._sources[name].read(reader)

  def __iter__(self) -> Iterator[str]:
    return iter(self._sources)

  def __len__(self) -> int:
    return len(self._sources)


def load_merged(
  directory: pathlib.Path, *, adapters: Sequence[Applied], mesh: Mesh, dtype: str = "float32"
) -> tuple[DecoderConfig, Params]:
  """Architecture and stacked parameters on the mesh, with the adapters applied in float32 before the cast to `dtype`.

  Low ranks are added block by block; what is replaced is on the host as the adapters are.

  Raises:
    InputError: What `sharded.load` raises, or adapters that do not go together.
  """
  with together(str(directory)):
    base = Checkpoint(directory)
    grown, new = prepare(base, adapters=adapters, config=base.config)
    kinds = edited(adapters)
    low = {name for name, found in kinds.items() if name in base and all(isinstance(one, LowRank) for one in found)}
    whole = set(kinds) - low
    values = {name: new[name] if name in new else base[name] for name in whole}
    changed = new | apply(values, adapters=adapters, only=whole)
    untied = base.config.tie_embeddings and not grown.tie_embeddings
    # Whether a head may be tied again shows in the embedding, which low ranks alone leave to the blocks.
    tied = untied and "embed.table" not in low
    grown, changed = settle(changed, adapters=adapters, config=grown, tied=tied)
    changes: dict[str, Any] = {name: np.asarray(x, np.float32) for name, x in changed.items()}
    changes |= {name: _Blocks(name, adapters) for name in low}
  return sharded.load(directory, mesh=mesh, dtype=dtype, edits=changes, config=grown)


def load_routed(
  directory: pathlib.Path, *, routes: Sequence[Sequence[Applied]], mesh: Mesh, dtype: str = "float32"
) -> tuple[DecoderConfig, Params]:
  """Architecture and stacked parameters on the mesh, with those of the routes beside them (`live`).

  Raises:
    InputError: What `sharded.load` raises, or routes that do not share one vocabulary.
  """
  with together(str(directory)):
    base = Checkpoint(directory)
    added = live.beside(base, routes=routes, config=base.config)
  config, params = sharded.load(directory, mesh=mesh, dtype=dtype, edits=added.replaced, config=added.config)
  where = live.shardings(Decoder(config), added.stacked, mesh=mesh)
  return config, params | {name: jax.device_put(x, where[name]) for name, x in added.stacked.items()}


class _Blocks:
  """An edit for `sharded.load`: all low ranks of one kernel, in the order and the modes of the stack."""

  def __init__(self, name: str, adapters: Sequence[Applied]):
    self._name = name
    self._adapters = adapters
    self._dora = any(one.magnitude is not None for one in edited(adapters)[name] if isinstance(one, LowRank))
    self._last: tuple[Any, np.ndarray] | None = None

  def __call__(self, value: np.ndarray, block: Block, read: Any) -> np.ndarray:
    rows, columns = block
    if not self._dora:
      return self._apply(value, rows, columns)
    # A column's length takes the whole column; blocks of the same columns may follow one another.
    if self._last is None or self._last[0] != columns:
      everything = slice(0, next(e.a.shape[0] for e in edited(self._adapters)[self._name] if isinstance(e, LowRank)))
      self._last = columns, self._apply(read((everything, columns)).astype(np.float32), everything, columns)
    return self._last[1][rows]

  def _apply(self, value: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
    cut = [(entry, _cut(adapter, self._name, rows, columns)) for entry, adapter in self._adapters]
    return apply({self._name: value}, adapters=cut, only=[self._name])[self._name]


def _cut(adapter: Adapter, name: str, rows: slice, columns: slice) -> Adapter:
  """The adapter of one block of one kernel."""
  found = []
  for one, edit in adapter.edits:
    if one == name and isinstance(edit, LowRank):
      magnitude = None if edit.magnitude is None else edit.magnitude[columns]
      cut = dataclasses.replace(edit, a=edit.a[rows], b=edit.b[:, columns], magnitude=magnitude)
      found.append((name, cut))
  return Adapter(path=adapter.path, edits=tuple(found))
