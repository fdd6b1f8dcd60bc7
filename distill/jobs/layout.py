"""Checks that a mesh divides the parameters of a run's models."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from distill.axes.logical import LOGICAL_TO_MESH, undivided
from distill.errors import InputError
from distill.models.decoder import Decoder

# Norms, biases and routers may be whole on every device; a kernel of a large model may not.
_LARGEST_BYTES = 16 * 2**20


def check_divides(decoder: Decoder, *, mesh: Mesh | AbstractMesh, dtype: str, key: str) -> None:
  """Refuses a mesh on which every device would hold a whole copy of a large parameter.

  Args:
    decoder: The model.
    mesh: The devices.
    dtype: Dtype of the parameters in memory.
    key: Key of the model in the recipe, for the message.

  Raises:
    InputError: No dimension of a parameter of more than 16 MiB divides among the devices of a mesh axis.
  """
  axes, width = decoder.axes(), jnp.dtype(dtype).itemsize
  copies = {}
  for name, x in decoder.abstract().items():
    size = width * math.prod(x.shape)
    for axis in undivided(mesh, x.shape, axes[name]) if size > _LARGEST_BYTES else ():
      copies[name] = (axis, size)
  if not copies:
    return
  largest = max(copies, key=lambda name: copies[name][1])
  axis = copies[largest][0]
  cost = sum(size * (1 - 1 / mesh.shape[axis]) for _, size in copies.values())
  fitting = _fitting(decoder, axis=axis, below=mesh.shape[axis])
  raise InputError(
    f"config.training.mesh.{axis}: {mesh.shape[axis]} divides no dimension of {len(copies)} large parameters of {key}, "
    f"such as {largest} {list(decoder.abstract()[largest].shape)}; whole copies of them would take {cost / 2**30:.2f} "
    f"GiB more of every device. Use {' or '.join(map(str, fitting))}, and more of config.training.mesh.data"
  )


def _fitting(decoder: Decoder, *, axis: str, below: int) -> Sequence[int]:
  """Returns the two largest factors of a mesh axis's size that divide a dimension of every large parameter."""
  wanted = {logical for logical, names in LOGICAL_TO_MESH.items() if axis in names}
  shapes = [
    [size for size, logical in zip(x.shape, decoder.axes()[name], strict=True) if logical != "layers"]
    for name, x in decoder.abstract().items()
    if math.prod(x.shape) > _LARGEST_BYTES // 4 and wanted & set(decoder.axes()[name])
  ]
  factors = [size for size in range(below - 1, 0, -1) if below % size == 0]
  return [size for size in factors if all(any(one % size == 0 for one in dims) for dims in shapes)][:2]
