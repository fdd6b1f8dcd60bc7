"""Loads a base model with adapters from files onto the mesh.

Either the adapters are merged into the base, or each row of a batch uses its own set of them (`routed`).
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from distill.adapters import routed
from distill.adapters.edits import LowRank
from distill.adapters.factored import Factored, factored
from distill.adapters.layout import EMBEDDING
from distill.adapters.merging import add_missing_parameters, apply_stack, check_finite, edited, fit_config
from distill.adapters.stack import StackedAdapter
from distill.checkpoints import hf, sharded
from distill.checkpoints.tensor_source import Block
from distill.models.config import DecoderConfig
from distill.models.decoder import Decoder
from distill.parallel.processes import fail_together
from distill.tree import Params


class StoredParams(Mapping[str, np.ndarray]):
  """A read-only view of a model directory: canonical name -> parameter, read from the files at each access."""

  def __init__(self, directory: pathlib.Path):
    self.config, self._sources = hf.sources(directory)

  def __getitem__(self, name: str) -> np.ndarray:
    return self._sources[name].read()

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of one parameter without reading it."""
    return self._sources[name].shape

  def __iter__(self) -> Iterator[str]:
    return iter(self._sources)

  def __len__(self) -> int:
    return len(self._sources)


def load_merged(
  directory: pathlib.Path, *, adapters: Sequence[StackedAdapter], mesh: Mesh, dtype: str = "float32"
) -> tuple[DecoderConfig, Params]:
  """Loads a base model with adapters merged into it. Merging runs in float32, before the cast to `dtype`.

  A parameter of the base that has only low-rank edits is changed chunk by chunk, as the base is read. All other edited
  parameters are changed whole, on the host.

  Args:
    directory: Model directory of the base.
    adapters: The adapters, in the order of the stack.
    mesh: The mesh to load onto.
    dtype: dtype of the parameters.

  Returns:
    The configuration after merging, and stacked parameters on the mesh.

  Raises:
    InputError: The model directory is incomplete or damaged, `dtype` cannot hold a value, merging makes a parameter
      infinite, an adapter does not fit the size that an earlier one gave a parameter, or embedding and head get
      different numbers of tokens.
  """
  with fail_together(str(directory)):
    base = StoredParams(directory)
    grown, added = add_missing_parameters(base, adapters=adapters, config=base.config)
    edits_of = edited(adapters)
    only_low_rank = {name for name, edits in edits_of.items() if all(isinstance(edit, LowRank) for edit in edits)}
    # Changed chunk by chunk as the base is read; the other edited parameters are changed whole, on the host.
    by_chunk = only_low_rank & set(base)
    whole = set(edits_of) - by_chunk
    values = {name: added[name] if name in added else base[name] for name in whole}
    changed = added | apply_stack(values, adapters=adapters, only=whole)
    untied_by_adapters = base.config.tie_embeddings and not grown.tie_embeddings
    # A head is tied again if it equals the embedding. An embedding that is changed by chunk is not on the host to be
    # compared, so its head remains untied.
    may_retie = untied_by_adapters and EMBEDDING not in by_chunk
    grown, changed = fit_config(changed, adapters=adapters, config=grown, tied=may_retie)
    replaced = {name: np.asarray(x, np.float32) for name, x in changed.items()}
    chunk_edits = {name: _LowRankEdit(name, adapters, shape=base.shape(name)) for name in by_chunk}
  return sharded.load(directory, mesh=mesh, dtype=dtype, edits={**replaced, **chunk_edits}, config=grown)


class _LowRankEdit:
  """A `ChunkEdit` for `sharded.load`: adds all low-rank changes of one parameter to each chunk that is read."""

  def __init__(self, name: str, adapters: Sequence[StackedAdapter], *, shape: tuple[int, ...]):
    self._name, self._adapters, self._shape = name, adapters, shape
    self._dora = any(edit.magnitude is not None for edit in edited(adapters)[name] if isinstance(edit, LowRank))
    self._last: tuple[slice, Factored] | None = None

  def __call__(self, value: np.ndarray, chunk: Block, read: Callable[[Block], np.ndarray]) -> np.ndarray:
    """Returns the values of a chunk after all low-rank edits.

    Args:
      value: The base's values of the chunk, float32.
      chunk: The chunk's (rows, columns) of the parameter [I, O].
      read: Reads any block of the base's parameter, without the edits, in the checkpoint's dtype.

    Raises:
      InputError: The edits make a value infinite or NaN.
    """
    rows, columns = chunk
    # DoRA needs the norms of whole columns. Consecutive chunks often have the same columns.
    chosen = columns if self._dora else slice(0, self._shape[1])
    if self._last is None or self._last[0] != chosen:
      found = factored(
        self._name,
        adapters=self._adapters,
        shape=self._shape,
        base=lambda: read((slice(0, self._shape[0]), chosen)).astype(np.float32),
        columns=chosen,
      )
      self._last = chosen, found
    change = self._last[1]
    if not self._dora:
      change = dataclasses.replace(change, b=change.b[:, columns], column=change.column[columns])
    with np.errstate(over="ignore", invalid="ignore"):
      after = change.of(value, rows=rows)
    check_finite(after, name=self._name, paths=[adapter.path for _, adapter in self._adapters])
    return after


def load_routed(
  directory: pathlib.Path, *, routes: Sequence[Sequence[StackedAdapter]], mesh: Mesh, dtype: str = "float32"
) -> tuple[DecoderConfig, Params]:
  """Loads a base model with the adapters of several routes, which are not merged into it (see `routed`).

  A route is the set of adapters that a row of a batch uses.

  Args:
    directory: Model directory of the base.
    routes: The adapters of each route, in the order of their stack.
    mesh: The mesh to load onto.
    dtype: dtype of the base's parameters; those of the routes are float32.

  Returns:
    The configuration, and stacked parameters of base and routes on the mesh.

  Raises:
    InputError: The model directory is incomplete or damaged, `dtype` cannot hold a value, or the routes do not share
      one vocabulary.
  """
  with fail_together(str(directory)):
    base = StoredParams(directory)
    added = routed.build_routed(base, routes=routes, config=base.config)
  config, params = sharded.load(directory, mesh=mesh, dtype=dtype, edits=added.replaced, config=added.config)
  where = routed.shardings(Decoder(config), added.stacked, mesh=mesh)
  return config, params | {name: jax.device_put(x, where[name]) for name, x in added.stacked.items()}
