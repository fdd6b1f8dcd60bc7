"""The device mesh, and the one place where logical axes become mesh axes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from distill.errors import InputError

AXES = ("data", "fsdp", "tensor")

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
  """Mesh over (data, fsdp, tensor); one entry of `shape` may be -1 and takes the devices that are left.

  Raises:
    InputError: The shape does not cover the devices exactly.
  """
  count = jax.device_count()
  known = math.prod(size for size in shape if size != -1)
  full = tuple(count // known if size == -1 else size for size in shape)
  if len(full) != len(AXES) or math.prod(full) != count:
    raise InputError(f"mesh: {tuple(shape)} does not cover {count} devices; the product of {AXES} must be {count}")
  return jax.make_mesh(full, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def sharding(mesh: Mesh, shape: Sequence[int], axes: Sequence[str | None]) -> NamedSharding:
  """Sharding of an array of `shape` with logical `axes`; a dimension that does not divide evenly is replicated."""
  spec: list[str | tuple[str, ...] | None] = []
  for size, axis in zip(shape, axes, strict=True):
    target = None if axis is None else LOGICAL_TO_MESH[axis]
    names = () if target is None else (target,) if isinstance(target, str) else target
    parts = math.prod(mesh.shape[name] for name in names)
    spec.append(target if parts > 1 and size % parts == 0 else None)
  return NamedSharding(mesh, PartitionSpec(*spec))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over the data and fsdp axes."""
  return NamedSharding(mesh, PartitionSpec(LOGICAL_TO_MESH["batch"]))


def batch_shards(mesh: Mesh) -> int:
  """Over how many parts of the mesh rows are spread."""
  return math.prod(mesh.shape[name] for name in LOGICAL_TO_MESH["batch"] or ())


def to_global_batch(batch: Any, *, mesh: Mesh) -> Any:
  """Arrays over all processes from each one's own rows, which follow one another in the order of the processes."""
  rows = batch_sharding(mesh)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), batch)
