"""Adapters that are not merged into the base model, so that each row of a batch can use its own set of adapters.

A *route* is an ordered set of adapters. Its LoRA and DoRA adapters, whatever their order, weights and modes, change a
matrix to column * base + a @ b, where `column` is one factor for each output column and a @ b is of low rank. So one
pass over the base serves the rows of all routes. Other changes (a replaced norm, a bias, a resized embedding) are
stored once for each different value.

Parameters of equal layers are stacked along a leading axis, as in `Decoder`. The word *stack* alone means the ordered
list of all adapters, from which each route takes some.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from distill.adapters.edits import LowRank
from distill.adapters.factored import Factored, factored
from distill.adapters.layout import EMBEDDING, HEAD
from distill.adapters.merging import add_missing_parameters, apply_stack, fit_config
from distill.adapters.stack import StackedAdapter
from distill.errors import InputError
from distill.models.config import DecoderConfig
from distill.models.decoder import Decoder
from distill.nn.matrix import RoutedMatrix
from distill.parallel.mesh import sharding
from distill.tree import Params
from distill.types import Readout

# Suffixes of a stacked parameter's routed parts: factors by route, or the different values and each route's index.
_A, _B, _COLUMN, _VALUES, _PLACE = ".route_a", ".route_b", ".route_column", ".route_values", ".route_place"
SUFFIXES = (_A, _B, _COLUMN, _VALUES, _PLACE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutedAdapters:
  """The parameters that routes add to a base. A route is a set of adapters; each row of a batch uses one route.

  Attributes:
    config: Configuration of base and routes.
    replaced: Canonical parameters that replace those of the base, or that the base lacks.
    stacked: Name of a stacked parameter plus a suffix such as `.route_a` -> factors or values of all routes.
  """

  config: DecoderConfig
  replaced: Params
  stacked: Params


def build_routed(
  params: Mapping[str, Any], *, routes: Sequence[Sequence[StackedAdapter]], config: DecoderConfig
) -> RoutedAdapters:
  """Returns the parameters that routes add to a base, as float32 arrays on the host.

  A route is a set of adapters; each row of a batch uses one route.

  Args:
    params: Canonical parameters of the base; only those that an edit depends on are read.
    routes: The adapters of each route, in the order of their stack.
    config: Configuration of the base.

  Raises:
    InputError: The routes do not share one vocabulary.
  """
  everything = list({id(one): one for route in routes for one in route}.values())
  grown, new = add_missing_parameters(params, adapters=everything, config=config)
  base = collections.ChainMap(new, params)  # type: ignore[arg-type]
  decoder = Decoder(grown)
  groups = {name: decoder.canonical(name) for name in decoder.abstract()}
  low, varied = _sort(everything, groups.values())
  originals = {name: np.asarray(base[name], np.float32) for name in varied}
  results = [originals | apply_stack(originals, adapters=route, only=varied) for route in routes]
  for name in varied & {EMBEDDING, HEAD}:
    if len({result[name].shape for result in results}) > 1:
      paths = ", ".join(str(adapter.path) for _, adapter in everything)
      raise InputError(
        f"{paths}: {name} has different numbers of tokens for rows with different sets of adapters, and all rows of a "
        "batch must share one vocabulary; merge the adapters that add tokens into the base"
      )
  replaced = {name: np.asarray(x, np.float32) for name, x in new.items()} | (results[0] if results else {})
  stacked: Params = {}
  for name, layers in groups.items():
    if any(layer in varied for layer in layers):
      stacked |= _values(name, layers, results, base)
    elif any(layer in low for layer in layers):
      stacked |= _factors(name, layers, routes, base, shape=decoder.abstract()[name].shape[-2:])
  grown, replaced = fit_config(replaced, adapters=everything, config=grown, tied=False)
  return RoutedAdapters(config=grown, replaced=replaced, stacked=stacked)


def stack_with_routes(
  params: Mapping[str, Any], *, routes: Sequence[Sequence[StackedAdapter]], config: DecoderConfig
) -> tuple[DecoderConfig, Params]:
  """Returns a base's parameters, stacked by layer on the host, together with those of its routes (sets of adapters).

  Args:
    params: Canonical parameters of the base.
    routes: The adapters of each route, in the order of their stack.
    config: Configuration of the base.

  Returns:
    The configuration, and stacked float32 parameters of base and routes.

  Raises:
    InputError: The routes do not share one vocabulary.
  """
  added = build_routed(params, routes=routes, config=config)
  whole = {name: np.asarray(x, np.float32) for name, x in {**params, **added.replaced}.items()}
  return added.config, Decoder(added.config).stack(whole) | added.stacked


def _sort(adapters: Sequence[StackedAdapter], groups: Iterable[list[str]]) -> tuple[set[str], set[str]]:
  """Splits the names of edited parameters; returns (matrices with only low-rank edits, all others).

  Stacked layers are treated alike: if a parameter of one layer is among the others, so is the same parameter of all
  layers that are stacked with it. A head with DoRA is among the others.
  """
  kinds: dict[str, set[str]] = {}
  for _, adapter in adapters:
    for name, edit in adapter.edits:
      low = isinstance(edit, LowRank) and (name.endswith(".kernel") or name == EMBEDDING)
      # All routes share one readout, whose columns are tokens, so the head cannot rescale columns by route.
      dora = isinstance(edit, LowRank) and edit.magnitude is not None and name == HEAD
      kinds.setdefault(name, set()).add("low" if low and not dora else "other")
  others = {name for name, found in kinds.items() if found != {"low"}}
  others |= {name for group in groups if others & set(group) for name in set(group) & set(kinds)}
  return set(kinds) - others, others


def _factors(
  name: str,
  layers: list[str],
  routes: Sequence[Sequence[StackedAdapter]],
  base: Mapping[str, Any],
  *,
  shape: tuple[int, ...],
) -> Params:
  """Returns the low-rank factors of one stacked matrix, for all layers and routes.

  The keys are the matrix's name with `.route_a` [layers,routes,I,R] and `.route_b` [layers,routes,R,O], where R is the
  largest rank; factors of lower rank are padded with zeros. A third key, with `.route_column` [layers,routes,O], is
  added unless all column factors are 1. The axis of layers is absent if the matrix is outside the layers.
  """

  def one(layer: str, route: Sequence[StackedAdapter]) -> Factored:
    return factored(layer, adapters=route, shape=shape, base=lambda: np.asarray(base[layer], np.float32))

  grid = [[one(layer, route) for route in routes] for layer in layers]
  rank = max(one.a.shape[1] for row in grid for one in row)

  def stacked_by_layer(arrays: list[list[np.ndarray]]) -> np.ndarray:
    rows = np.stack([np.stack(row) for row in arrays])
    return rows if name.startswith("groups.") else rows[0]

  def pad(x: np.ndarray, axis: int) -> np.ndarray:
    widths = [(0, 0), (0, 0)]
    widths[axis] = (0, rank - x.shape[axis])
    return np.pad(x, widths)

  found = {
    f"{name}{_A}": stacked_by_layer([[pad(one.a, 1) for one in row] for row in grid]),
    f"{name}{_B}": stacked_by_layer([[pad(one.b, 0) for one in row] for row in grid]),
  }
  if any((one.column != 1).any() for row in grid for one in row):
    found[f"{name}{_COLUMN}"] = stacked_by_layer([[one.column for one in row] for row in grid])
  return found


def _values(name: str, layers: list[str], results: list[Params], base: Mapping[str, Any]) -> Params:
  """Returns the distinct values that a stacked parameter has for the routes, and the index of each route's value.

  Args:
    name: Stacked name of the parameter.
    layers: Canonical names of its layers.
    results: For each route, canonical name -> parameter with the route's adapters.
    base: Canonical name -> parameter of the base, for layers that no adapter changes.

  Returns:
    {`name`.route_values: the distinct values, stacked, `name`.route_place: [routes] indices of the routes' values}; or
    {} if all routes have the same value, because it then replaces that of the base.
  """
  others = {layer: np.asarray(base[layer], np.float32) for layer in layers if layer not in results[0]}
  different: list[np.ndarray] = []
  places = []
  for result in results:
    row = np.stack([result[layer] if layer in result else others[layer] for layer in layers])
    known = [i for i, one in enumerate(different) if np.array_equal(one, row)]
    places.append(known[0] if known else len(different))
    if not known:
      different.append(row)
  if len(different) == 1:
    return {}
  values = np.stack(different)
  stacked = name.startswith("groups.")
  return {f"{name}{_VALUES}": values if stacked else values[:, 0], f"{name}{_PLACE}": np.asarray(places, np.int32)}


def is_routed(params: Mapping[str, Any]) -> bool:
  """Returns True if the stacked parameters `params` hold routed adapters in addition to the base."""
  return any(name.endswith(SUFFIXES) for name in params)


def shardings(decoder: Decoder, params: Mapping[str, Any], *, mesh: Mesh) -> dict[str, NamedSharding]:
  """Returns name -> sharding of all parameters: those of the base, and those that hold adapters not merged into it.

  A low-rank factor shares one axis with its matrix, and that axis is sharded as in the matrix; the rank axis is not
  sharded.

  Args:
    decoder: The decoder of the base.
    params: Stacked parameters of the base and of unmerged adapters, or the shapes of these parameters.
    mesh: The mesh that the parameters are sharded over.
  """
  axes, found = decoder.axes(), decoder.shardings(mesh)
  for name, x in params.items():
    for suffix in SUFFIXES:
      if not name.endswith(suffix):
        continue
      matrix = axes[name.removesuffix(suffix)]
      if suffix == _PLACE:
        sides: tuple[str | None, ...] = ()
      elif suffix == _VALUES:
        sides = matrix
      else:
        sides = {_A: (matrix[-2], "rank"), _B: ("rank", matrix[-1]), _COLUMN: matrix[-1:]}[suffix]
      logical = (*([None] * (x.ndim - len(sides))), *sides)
      found[name] = sharding(mesh, x.shape, logical)
  return found


def select_route(
  params: Mapping[str, Any], *, tokens: Int[Array, " T"], route: Int[Array, ""]
) -> tuple[Params, Int[Array, " T"]]:
  """Returns (the decoder's parameters for ONE row of a batch, index [T] of each token in their embedding table).

  The index is the token id, unless routes have different embeddings: then their tables are concatenated into one, and
  the ids are shifted to the rows of this route's table.

  The head stays that of the base: `widen_readout` makes one readout for the rows of all routes.

  Args:
    params: Stacked parameters of base and routes.
    tokens: [T] token ids of the row.
    route: Index of the row's route, from 0.
  """
  chosen = {name: x for name, x in params.items() if not name.endswith(SUFFIXES)}
  for name, x in list(chosen.items()):
    if name == HEAD:
      continue
    layers = x.shape[:1] if name.startswith("groups.") else ()
    if f"{name}{_A}" in params:
      chosen[name] = RoutedMatrix(
        matrix=x,
        a=params[f"{name}{_A}"],
        b=params[f"{name}{_B}"],
        column=params.get(f"{name}{_COLUMN}"),
        # The decoder scans over layers and cuts every leaf by its first axis, so the route is repeated for each layer.
        route=jnp.broadcast_to(route, layers),
      )
    elif f"{name}{_VALUES}" in params:
      values, place = params[f"{name}{_VALUES}"], params[f"{name}{_PLACE}"][route]
      if name == EMBEDDING:
        # The tables of all routes become one long table, which rows share. A token's row in it is shifted by the tables
        # before that of the route.
        chosen[name], tokens = values.reshape(-1, values.shape[-1]), tokens + place * values.shape[1]
      else:
        chosen[name] = values[place]
  return chosen, tokens


def widen_readout(
  params: Mapping[str, Any], *, hidden: Float[Array, "B T D"], readout: Readout, routes: Int[Array, " B"]
) -> tuple[Float[Array, "B T widened"], Readout]:
  """Returns (hidden states, one readout for the rows of all routes).

  Both are unchanged if `params` holds no head by route. If it holds LoRA factors, the widened kernel [widened, V] is
  the base's kernel and below it a block of rows, the factor B, for each route. If it holds whole heads, the widened
  kernel has one block of rows for each different head. A widened hidden state is zero at the blocks that its route does
  not use.

  Args:
    params: Stacked parameters of base and routes.
    hidden: [B, T, D] final hidden states.
    readout: The readout of the base.
    routes: [B] index of each row's route, from 0.
  """
  if f"{HEAD}{_VALUES}" in params:
    values, place = params[f"{HEAD}{_VALUES}"], params[f"{HEAD}{_PLACE}"][routes]
    hidden = _blocks(hidden[:, :, None, :], place, values.shape[0])
    kernel = values.reshape(-1, values.shape[-1]).astype(readout.kernel.dtype)
    return hidden, dataclasses.replace(readout, kernel=kernel)
  if f"{HEAD}{_A}" not in params:
    return hidden, readout
  a, b = (params[f"{HEAD}{suffix}"].astype(readout.kernel.dtype) for suffix in (_A, _B))
  low = jnp.einsum("btd,ndr->btnr", hidden.astype(a.dtype), a, preferred_element_type=jnp.float32)
  hidden = jnp.concatenate([hidden, _blocks(low.astype(hidden.dtype), routes, a.shape[0])], axis=-1)
  kernel = jnp.concatenate([readout.kernel, b.reshape(-1, b.shape[-1])])
  return hidden, dataclasses.replace(readout, kernel=kernel)


def _blocks(x: Float[Array, "B T _ I"], place: Int[Array, " B"], count: int) -> Float[Array, "B T widened"]:
  chosen = jax.nn.one_hot(place, count, dtype=x.dtype)[:, None, :, None]
  return (x * chosen).reshape(*x.shape[:2], -1)
