"""The device mesh, and the mapping from logical axes of arrays to mesh axes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from distill.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis of an array -> the mesh axes that it is sharded over; None for replicated.
LOGICAL_TO_MESH: Mapping[str, str | tuple[str, ...] | None] = {
  "batch": ("data", "fsdp"),
  "embed": "fsdp",
  "mlp": "tensor",
  "experts": "tensor",
  "heads": "tensor",
  "kv_heads": "tensor",
  "vocab": "tensor",
  "layers": None,
  "rank": None,
}


def make_mesh(shape: Sequence[int] = (-1, 1, 1)) -> Mesh:
  """Returns a mesh over all devices with the axes (data, fsdp, tensor).

  Args:
    shape: Size of each axis. One size may be -1; it becomes the number of devices divided by the other sizes.

  Raises:
    InputError: The product of the sizes is not the number of devices.
  """
  count = jax.device_count()
  known = math.prod(size for size in shape if size != -1)
  full = tuple(count // known if size == -1 else size for size in shape)
  if len(full) != len(MESH_AXES) or math.prod(full) != count:
    raise InputError(
      f"mesh: the shape {tuple(shape)} does not fit {count} devices; give one size for each axis {MESH_AXES}, with a "
      f"product of {count} (one size may be -1 for the rest)"
    )
  return jax.make_mesh(full, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def sharding(mesh: Mesh, shape: Sequence[int], axes: Sequence[str | None]) -> NamedSharding:
  """Returns the sharding of an array; a dimension that cannot be divided evenly over its mesh axes is replicated.

  Args:
    mesh: The mesh of devices.
    shape: Shape of the array.
    axes: Logical axis of each dimension, a key of `LOGICAL_TO_MESH`, or None for a replicated dimension.
  """
  spec: list[str | tuple[str, ...] | None] = []
  for size, axis in zip(shape, axes, strict=True):
    target = None if axis is None else LOGICAL_TO_MESH[axis]
    names = () if target is None else (target,) if isinstance(target, str) else target
    parts = math.prod(mesh.shape[name] for name in names)
    spec.append(target if parts > 1 and size % parts == 0 else None)
  return NamedSharding(mesh, PartitionSpec(*spec))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that keeps the whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of rows [B,…] over the data and fsdp axes."""
  return NamedSharding(mesh, PartitionSpec(LOGICAL_TO_MESH["batch"]))


def batch_shards(mesh: Mesh) -> int:
  """Returns the number of parts that `batch_sharding` divides a batch into: size of mesh axis data × that of fsdp."""
  return math.prod(mesh.shape[name] for name in LOGICAL_TO_MESH["batch"] or ())


def to_global_batch(batch: Any, *, mesh: Mesh) -> Any:
  """Builds global arrays from the arrays of rows that each process passes.

  Args:
    batch: A pytree of this process's rows. The global arrays hold the rows of all processes, in process order.
    mesh: The mesh that the global arrays are sharded over, as `batch_sharding` says.
  """
  rows = batch_sharding(mesh)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), batch)
