"""Loads a checkpoint straight onto the mesh: every process reads only what its devices hold.

A *region* is the part of a parameter that one device holds. A *block* is a part that is loaded in one pass: one
region, or several regions without gaps between them. A *chunk* is a piece of a block, of about 256 KiB; it is the unit
in which values are read, edited and cast.
"""

import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from distill.checkpoints import hf
from distill.checkpoints.parameter_sources import ParameterSource
from distill.checkpoints.tensor_source import Block
from distill.errors import InputError
from distill.files.tensors import finite
from distill.models.config import DecoderConfig
from distill.models.decoder import Decoder
from distill.parallel.processes import fail_together
from distill.tree import Params

# (values of a chunk in float32, the chunk, a function that reads any block in the checkpoint's dtype) -> its new values
ChunkEdit = Callable[[np.ndarray, Block, Callable[[Block], np.ndarray]], np.ndarray]
ChunkEdits = Mapping[str, ChunkEdit | np.ndarray]

# The part of a parameter that one device holds; ranges can be dictionary keys, slices cannot.
Region = tuple[range, ...]

# Layers are loaded together as long as their buffers on the host take no more.
_BUFFER_BYTES = 256 * 2**20
# Fits a core's cache: checks and transposed copies are several times faster from there than from memory.
_CHUNK_BYTES = 2**18


def load(
  directory: pathlib.Path,
  *,
  mesh: Mesh,
  dtype: Any = "float32",
  edits: ChunkEdits | None = None,
  config: DecoderConfig | None = None,
  report: Callable[[int], Any] = lambda size: None,
) -> tuple[DecoderConfig, Params]:
  """Loads a model directory onto a mesh.

  Host memory stays below the largest tensor plus a gigabyte, whatever the model's size.

  Args:
    directory: A model directory.
    mesh: The mesh.
    dtype: float32, bfloat16 or float16. Edits run in float32 before the cast.
    edits: Canonical name -> a function that changes every chunk as it is read, or an array that replaces the
      parameter and has the shape that `config` says.
    config: The configuration after the edits; None if the edits leave that of the directory unchanged.
    report: Called after every read of this process with the number of bytes of that read.

  Returns:
    The configuration, and stacked parameters sharded as `Decoder.shardings` says.

  Raises:
    InputError: A file is missing or damaged, a tensor is missing, unexpected, of the wrong shape or not finite, or
      `dtype` cannot hold a value. If one process raises, all do.
  """
  with fail_together(str(directory)):
    edits = edits or {}
    found, sources = hf.sources(directory)
    config = config or found
    decoder = Decoder(config)
    shardings = decoder.shardings(mesh)
    total = _bytes(decoder, shardings, sources, edits)
    bar = tqdm(total=total, desc=f"loading {pathlib.Path(directory).name}", unit="B", unit_scale=True, disable=None)

    def count(size: int) -> None:
      bar.update(size)
      report(size)

    with bar:
      loader = _Loader(
        sources=sources, edits=edits, dtype=np.dtype(jnp.dtype(dtype)), where=str(directory), report=count
      )
      params = {
        name: loader.parameter(
          decoder.canonical(name), shape=x.shape, sharding=shardings[name], stacked=name.startswith("groups.")
        )
        for name, x in decoder.abstract().items()
      }
  return config, params


def _bytes(decoder, shardings, sources, edits) -> int:
  """Returns how many bytes of parameters this process will read.

  An array in `edits` replaces a parameter, which is then not read. Other edits may read more than this process's part
  of a parameter; those reads are not counted.
  """
  total = 0
  for name, x in decoder.abstract().items():
    sizes = (_size(one) for one in _regions(shardings[name], x.shape))
    first = decoder.canonical(name)[0]
    total += 0 if isinstance(edits.get(first), np.ndarray) else sum(sizes) * sources[first].dtype.itemsize
  return total


def _size(region: Region) -> int:
  return math.prod(map(len, region))


def _regions(sharding: NamedSharding, shape: Sequence[int]) -> dict[Region, list[jax.Device]]:
  """Returns region -> devices that hold it, for each distinct region of an array on the devices of this process."""
  regions: dict[Region, list[jax.Device]] = {}
  for device, index in sharding.addressable_devices_indices_map(tuple(shape)).items():
    region = tuple(range(size)[cut] for cut, size in zip(index or (), shape, strict=True))
    regions.setdefault(region, []).append(device)
  return regions


def _blocks(regions: Sequence[Region]) -> list[Block]:
  """Returns the blocks to read: one block that spans all `regions` if they fill it, else one block for each region.

  A single block is faster to read, because its contiguous stretches in the file are longer.
  """
  whole = tuple(
    slice(min(cut.start for cut in cuts), max(cut.stop for cut in cuts)) for cuts in zip(*regions, strict=True)
  )
  if math.prod(cut.stop - cut.start for cut in whole) == sum(map(_size, regions)):
    return [whole]
  return [tuple(slice(cut.start, cut.stop) for cut in region) for region in regions]


def _overlap(chunk: Block, region: Region) -> tuple[Block, Block] | None:
  """Returns where a chunk and a region overlap: (block within the region, block within the chunk); None if nowhere."""
  shared = [(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(chunk, region, strict=True)]
  if any(start >= stop for start, stop in shared):
    return None
  inside = tuple(slice(*(at - cut.start for at in ends)) for ends, cut in zip(shared, region, strict=True))
  out = tuple(slice(*(at - cut.start for at in ends)) for ends, cut in zip(shared, chunk, strict=True))
  return inside, out


class _Loader:
  """Loads stacked parameters onto the mesh, one with each call of `parameter`."""

  def __init__(
    self,
    *,
    sources: Mapping[str, ParameterSource],
    edits: ChunkEdits,
    dtype: np.dtype,
    where: str,
    report: Callable[[int], Any],
  ):
    self._sources, self._edits, self._dtype, self._where, self._report = sources, edits, dtype, where, report

  def parameter(
    self, layers: list[str], *, shape: tuple[int, ...], sharding: NamedSharding, stacked: bool
  ) -> jax.Array:
    """Returns one parameter on the mesh.

    A stacked one is loaded a few layers at a time if all layers at once need too much host memory.

    Args:
      layers: Canonical name of each layer's parameter, or of the one parameter if it is not stacked.
      shape: Shape of the result, with the leading dimension of layers if it is stacked.
      sharding: Sharding of the result.
      stacked: True if the parameter has a leading dimension of layers.
    """
    if not stacked:
      return self._layers(layers, sharding=sharding, shape=shape, stacked=False)
    assert not sharding.spec or sharding.spec[0] is None, sharding
    held = sum(_size(region) for region in _regions(sharding, (1, *shape[1:])))
    count = max(1, _BUFFER_BYTES // max(held * self._dtype.itemsize, 1))
    if count >= len(layers):
      return self._layers(layers, sharding=sharding, shape=shape)
    whole = jax.jit(lambda: jnp.zeros(shape, self._dtype), out_shardings=sharding)()
    put = jax.jit(_put, donate_argnums=0, out_shardings=sharding)
    for start in range(0, len(layers), count):
      names = layers[start : start + count]
      part = self._layers(names, sharding=sharding, shape=(len(names), *shape[1:]))
      whole = put(whole, part, start).block_until_ready()
    return whole

  def _layers(self, names: list[str], *, sharding: NamedSharding, shape: tuple[int, ...], stacked: bool = True):
    """Loads some layers of a stacked parameter, or one parameter that is not stacked; returns an array on the mesh.

    Args:
      names: Canonical name of each layer's parameter, or of the one parameter.
      sharding: Sharding of the result.
      shape: Shape of the result, with the leading dimension of layers if it is stacked.
      stacked: True for layers of a stacked parameter.
    """
    inner = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:])) if stacked else sharding
    regions = _regions(inner, shape[1:] if stacked else shape)
    buffers = {region: np.empty((len(names), *map(len, region)), self._dtype) for region in regions}
    for i, name in enumerate(names):
      self._fill(name, {region: buffer[i] for region, buffer in buffers.items()})
    shards = [
      jax.device_put(buffers[region] if stacked else buffers[region][0], device)
      for region, devices in regions.items()
      for device in devices
    ]
    # Without the wait the host runs ahead of the devices, and its buffers pile up.
    return jax.make_array_from_single_device_arrays(shape, sharding, shards).block_until_ready()

  def _fill(self, name: str, targets: Mapping[Region, np.ndarray]) -> None:
    """Reads one canonical parameter into `targets`: region -> host array that receives the values of this region."""
    for block in _blocks(list(targets)):
      for chunk, value in self._values(name, block):
        if value.dtype != self._dtype:
          with np.errstate(over="ignore", invalid="ignore"):
            value = value.astype(self._dtype)
          if not finite(value):
            raise InputError(
              f"{self._where}: {name} has values that {self._dtype} cannot hold; load the model as bfloat16"
            )
        for region, target in targets.items():
          if (shared := _overlap(chunk, region)) is not None:
            target[shared[0]] = value[shared[1]]

  def _values(self, name: str, block: Block) -> Iterator[tuple[Block, np.ndarray]]:
    """Yields (chunk, its values) for chunks that together cover `block` of one canonical parameter.

    The values include the edit of the parameter, if the argument `edits` of `load` has one.
    """
    edit = self._edits.get(name)
    if isinstance(edit, np.ndarray):
      yield block, edit[block]
      return
    source = self._sources[name]

    def read(block: Block) -> np.ndarray:
      value = source.read(index=block)
      self._report(value.nbytes)
      return value

    for chunk in source.chunks(block, size=_CHUNK_BYTES):
      value = read(chunk)
      yield chunk, value if edit is None else edit(value.astype(np.float32), chunk, read)


def _put(whole: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(whole, part, start, 0)
