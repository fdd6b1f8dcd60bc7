"""Shardings by logical axes, and the mesh that traced code runs on: modules and kernels name axes, never devices."""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Shaped

Axes = Sequence[str | None]

# Logical axis of an array -> the mesh axes that it is sharded over; none for replicated.
LOGICAL_TO_MESH: Mapping[str, tuple[str, ...]] = {
  "batch": ("slice", "data", "fsdp", "expert"),
  # Rows of an activation whose model width takes the fsdp axis.
  "replica": ("slice", "data", "expert"),
  "embed": ("fsdp",),
  "mlp": ("tensor",),
  "experts": ("expert", "tensor"),
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
  "vocab": ("tensor",),
  "layers": (),
  "rank": (),
}


def _places(mesh: Any, shape: Sequence[int], axes: Axes) -> tuple[list[tuple[str, ...]], list[str]]:
  """Returns the mesh axes of every dimension, and those mesh axes that no dimension can be divided over."""
  places: list[tuple[str, ...]] = [() for _ in shape]

  def divides(i: int, name: str) -> bool:
    return shape[i] % (count_parts(mesh, places[i]) * mesh.shape[name]) == 0

  homeless = []
  for i, axis in enumerate(axes):
    for name in () if axis is None else LOGICAL_TO_MESH[axis]:
      if mesh.shape[name] == 1:
        continue
      if divides(i, name):
        places[i] = (*places[i], name)
      else:
        homeless.append(name)
  lost = []
  for name in homeless:
    fitting = [i for i, axis in enumerate(axes) if axis not in ("layers", "batch", "replica") and divides(i, name)]
    if {"batch", "replica"} & set(axes) or not fitting:
      lost.append(name)
    else:
      largest = max(fitting, key=lambda i: shape[i] // count_parts(mesh, places[i]))
      places[largest] = (*places[largest], name)
  return places, lost


def count_parts(mesh: Any, names: Sequence[str]) -> int:
  return math.prod(mesh.shape[name] for name in names)


def spec(mesh: Any, shape: Sequence[int], axes: Axes) -> PartitionSpec:
  """Returns how an array is divided over the mesh axes that its logical axes name.

  Where a dimension of a parameter does not divide evenly, the largest other dimension that does takes its place.

  Args:
    mesh: The mesh, concrete or abstract.
    shape: Shape of the array.
    axes: Logical axis of each dimension, a key of `LOGICAL_TO_MESH`, or None.
  """
  places, _ = _places(mesh, shape, axes)
  return PartitionSpec(*(None if not names else names[0] if len(names) == 1 else names for names in places))


def undivided(mesh: Any, shape: Sequence[int], axes: Axes) -> list[str]:
  """Returns the mesh axes along which every device holds a copy, though the logical axes name them: nothing divides.

  Args: as `spec`.
  """
  return _places(mesh, shape, axes)[1]


_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
  """Returns a context in which `constrain` and `each_shard` act on `mesh`; enter it inside a function that jax traces.

  The mesh is the ambient one of jax, so that modules and kernels need no argument for it.
  """
  token = _PLATFORM.set(mesh.devices.flat[0].platform)
  try:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      yield
  finally:
    _PLATFORM.reset(token)


def platform() -> str:
  """Returns what the traced computation will run on: cpu, gpu or tpu, by the devices of `use_mesh` or of jax.

  Kernels choose their implementation by it. The devices may be described ones, for which a step is compiled ahead.
  """
  return _PLATFORM.get() or jax.default_backend()


def constrain(x: Shaped[Array, "..."], axes: Axes) -> Shaped[Array, "..."]:
  """Returns x, divided over the mesh of `use_mesh` as its logical axes say; x as it is outside of that context.

  XLA spreads the shardings of parameters to what is computed from them. Without constraints it moves the batch off the
  fsdp axis, since the embedding table is divided over that axis: every device then computes many rows.

  Args:
    x: An activation.
    axes: Logical axis of each dimension; None for a dimension that is whole on every device.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, spec(mesh, x.shape, axes))


def sum_shards(x: Float[Array, "shards ..."], axes: Axes) -> Float[Array, "..."]:
  """Returns the sum over batch shards, divided over the mesh as `axes` say.

  The parts along the fsdp axis are summed first, straight into the parts of the result (a reduce-scatter). In one sum
  XLA adds up the whole array on every device (an all-reduce), which moves as many times more bytes as there are parts.

  Args:
    x: One value for each of the `batch_shards`.
    axes: Logical axes of the result.
  """
  mesh = jax.sharding.get_abstract_mesh()
  places = [] if mesh.empty else _places(mesh, x.shape[1:], axes)[0]
  scattered = next((i for i, names in enumerate(places) if names[-1:] == ("fsdp",)), None)
  if scattered is None:
    return constrain(jnp.sum(x, axis=0), axes)
  whole = [tuple(name for name in names if name != "fsdp") for names in places]

  def local(x: Float[Array, "1 ..."]) -> Float[Array, "..."]:
    part = jax.lax.psum_scatter(x[0], "fsdp", scatter_dimension=scattered, tiled=True)
    return jax.lax.psum(part, [name for name in LOGICAL_TO_MESH["batch"] if name != "fsdp"])

  rows = LOGICAL_TO_MESH["batch"]
  return jax.shard_map(local, in_specs=PartitionSpec(rows, *whole), out_specs=PartitionSpec(*places))(x)


def each_shard(
  function: Callable[..., Any], *, inputs: Sequence[Axes], outputs: Sequence[Axes], like: Sequence[Any]
) -> Callable[..., Any]:
  """Returns a function that runs once on every device of `use_mesh`, on that device's part of each argument.

  Hand-written kernels need this: XLA cannot divide them itself. Outside of `use_mesh` it is `function` itself.

  Args:
    function: Takes arrays and returns one array, or as many as `outputs` has entries.
    inputs: Logical axes of each argument.
    outputs: Logical axes of each result.
    like: An array, or its shape, for each argument and then each result: they tell which dimensions divide evenly.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return function
  specs = [spec(mesh, x.shape, axes) for x, axes in zip(like, [*inputs, *outputs], strict=True)]
  results = tuple(specs[len(inputs) :])
  return jax.shard_map(
    function,
    in_specs=tuple(specs[: len(inputs)]),
    out_specs=results if len(results) > 1 else results[0],
    check_vma=False,
  )
