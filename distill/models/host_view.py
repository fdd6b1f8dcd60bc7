"""Parameters between the host and the mesh: canonical names on the host, stacked layers on the mesh."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from distill.models.decoder import Decoder
from distill.parallel.mesh import replicated
from distill.tree import Params


class HostView(Mapping[str, np.ndarray]):
  """A read-only view of stacked parameters under canonical names.

  Reading one name copies one layer to the host, so a model larger than the host's memory can be read layer by layer.
  On several processes the read is collective: all of them must read the same names in the same order.

  Args:
    decoder: The model, which knows how its layers are stacked.
    params: Stacked parameters on the mesh.
    mesh: The mesh that the parameters are on.
  """

  def __init__(self, decoder: Decoder, params: Mapping[str, Any], *, mesh: Mesh):
    self._params = params
    self._places: dict[str, tuple[str, int | None]] = {}
    for name in params:
      stacked = name.startswith("groups.")
      self._places |= {one: (name, i if stacked else None) for i, one in enumerate(decoder.canonical(name))}
    everywhere = replicated(mesh)
    self._whole = jax.jit(lambda x: x, out_shardings=everywhere)
    self._layer = jax.jit(lambda x, i: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), out_shardings=everywhere)

  def __getitem__(self, name: str) -> np.ndarray:
    stacked, layer = self._places[name]
    value = self._params[stacked]
    gathered = self._whole(value) if layer is None else self._layer(value, layer)
    return np.asarray(gathered.addressable_data(0))

  def __iter__(self) -> Iterator[str]:
    return iter(self._places)

  def __len__(self) -> int:
    return len(self._places)

  def __contains__(self, name: object) -> bool:
    return name in self._places


def place(decoder: Decoder, params: Mapping[str, Any], *, mesh: Mesh) -> Params:
  """Stacks canonical parameters and copies them to the mesh.

  Args:
    decoder: The model, which knows how its layers are stacked.
    params: Parameters on the host under canonical names, of any floating dtype.
    mesh: The mesh to place them on.

  Returns:
    Stacked float32 parameters, sharded as `Decoder.shardings` says.
  """
  shardings = decoder.shardings(mesh)
  stacked = decoder.stack(params)
  return {name: jax.device_put(np.asarray(x, np.float32), shardings[name]) for name, x in stacked.items()}
