"""The device mesh, and the mapping from logical axes of arrays to mesh axes."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from distill.axes.logical import LOGICAL_TO_MESH, Axes, count_parts, spec
from distill.configuration import option
from distill.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices along each axis of the mesh; one axis may be -1 and takes the devices that are left.

  The axes are in the order of the traffic on them, from least to most: the last ones get the nearest neighbours.
  """

  slice: int = option(1, help="Slices of a pod, or hosts of GPUs; only gradients cross them.", least=-1)
  data: int = option(-1, help="Replicas of all parameters.", least=-1)
  fsdp: int = option(1, help="Parts of every parameter; a part is gathered where it is used.", least=-1)
  expert: int = option(1, help="Parts of the experts of a mixture; tokens travel to their experts.", least=-1)
  tensor: int = option(1, help="Parts of heads, MLP neurons and vocabulary.", least=-1)

  def sizes(self) -> dict[str, int]:
    """Returns the size of every axis by name."""
    return dataclasses.asdict(self)


def make_mesh(config: MeshConfig | None = None, *, devices: Sequence[Any] | None = None) -> Mesh:
  """Returns a mesh whose axes are the fields of `MeshConfig`.

  Neighbours on an axis are neighbours in the machine: axes follow the physical torus and may split its dimensions, and
  slices of a pod are joined along the slice axis alone.

  Args:
    config: Size of each axis; by default all devices are on the data axis.
    devices: The devices; by default all.

  Raises:
    InputError: The sizes do not cover the devices exactly, or no arrangement of the devices has them.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = (config or MeshConfig()).sizes()
  shape = tuple(_fill(sizes, count=len(devices)).values())
  axis_types = (AxisType.Auto,) * len(shape)
  try:
    return Mesh(_arranged(shape, devices), tuple(sizes), axis_types=axis_types)
  except (NotImplementedError, ValueError, AssertionError) as error:
    where = f"{len(devices)} devices of kind {devices[0].device_kind}"
    raise InputError(f"config.training.mesh: {_shown(sizes)} cannot be laid out on {where}: {error}") from error


def _shown(sizes: Mapping[str, int]) -> str:
  return ", ".join(f"{name}={size}" for name, size in sizes.items() if size != 1) or "data=1"


def _fill(sizes: Mapping[str, int], *, count: int) -> dict[str, int]:
  """Returns the sizes with -1 replaced by the devices that are left."""
  known = math.prod(size for size in sizes.values() if size != -1)
  open_axes = [name for name, size in sizes.items() if size == -1]
  full = {name: count // max(known, 1) if size == -1 else size for name, size in sizes.items()}
  if len(open_axes) > 1 or math.prod(full.values()) != count:
    raise InputError(
      f"config.training.mesh: {_shown(sizes)} does not fit {count} devices; give sizes whose product is {count} (one "
      "axis may be -1 for the rest; data is -1 unless it is set)"
    )
  return full


def _arranged(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
  """Returns the devices as an array of `shape`, whose first axis is the slice axis."""
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices > 1 and shape[0] != slices:
    raise ValueError(f"they are in {slices} slices; set config.training.mesh.slice={slices}")
  if shape[0] == 1:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  by_slice = slices == shape[0]
  if not by_slice and len({device.process_index for device in devices}) != shape[0]:
    return np.asarray(devices, dtype=object).reshape(shape)
  within, across = (1, *shape[1:]), (shape[0], *[1] * (len(shape) - 1))
  return mesh_utils.create_hybrid_device_mesh(
    within, across, devices, process_is_granule=not by_slice, allow_split_physical_axes=True
  )


def sharding(mesh: Mesh, shape: Sequence[int], axes: Axes) -> NamedSharding:
  """Returns the sharding of an array.

  Args: as `spec`.
  """
  return NamedSharding(mesh, spec(mesh, shape, axes))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that keeps the whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of the rows of a batch [B,…]."""
  return NamedSharding(mesh, PartitionSpec(LOGICAL_TO_MESH["batch"]))


def batch_shards(mesh: Any) -> int:
  """Returns the number of parts that `batch_sharding` divides a batch into."""
  return count_parts(mesh, LOGICAL_TO_MESH["batch"])


def process_rows(mesh: Mesh, rows: int) -> Int[np.ndarray, " B"]:
  """Returns which rows of a global batch the devices of this process hold, in ascending order.

  Devices of a process need not hold neighbouring rows, and several processes may hold the same ones.

  Args:
    mesh: The mesh.
    rows: Rows of the global batch, a multiple of `batch_shards`.
  """
  per_shard = rows // batch_shards(mesh)
  return (_held_shards(mesh)[:, None] * per_shard + np.arange(per_shard)[None, :]).reshape(-1)


def _held_shards(mesh: Mesh) -> Int[np.ndarray, " shards"]:
  """Returns the numbers of the batch shards that the devices of this process hold, in ascending order."""
  count = batch_shards(mesh)
  indices = batch_sharding(mesh).addressable_devices_indices_map((count,)).values()
  return np.asarray(sorted({range(count)[cut].start for (cut,) in indices}))  # type: ignore[misc]


def to_global_batch(batch: Any, *, mesh: Mesh) -> Any:
  """Returns global arrays [B,…] from the rows that this process holds.

  Args:
    batch: A pytree of host arrays whose rows are those of `process_rows`, in its order.
    mesh: The mesh.
  """
  held, shards, rows_sharding = _held_shards(mesh), batch_shards(mesh), batch_sharding(mesh)

  def whole(x: np.ndarray) -> jax.Array:
    per_shard = len(x) // len(held)

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
      assert index is not None, "every array of a batch has rows"
      place = int(np.searchsorted(held, (index[0].start or 0) // per_shard))
      return x[place * per_shard : (place + 1) * per_shard]

    return jax.make_array_from_callback((per_shard * shards, *x.shape[1:]), rows_sharding, part)

  return jax.tree.map(whole, batch)
