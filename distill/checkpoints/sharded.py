"""From a checkpoint's files straight onto the mesh: every process reads what its devices hold, and no more."""

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
from distill.checkpoints.tensor_sources import Block, Source
from distill.errors import InputError
from distill.files.tensors import Reader, finite
from distill.models.config import DecoderConfig
from distill.models.decoder import Decoder
from distill.parallel.processes import fail_together
from distill.tree import Params

# (block in float32, where it lies in the canonical parameter, reader of any other block of it as stored) -> block
Edit = Callable[[np.ndarray, Block, Callable[[Block], np.ndarray]], np.ndarray]


Edits = Mapping[str, Edit | np.ndarray]

# What of a parameter one device holds; slices cannot be keys.
Region = tuple[range, ...]

_STRETCH = 256 * 2**20
# Fits a core's cache: checks and transposed copies are several times faster from there than from memory.
_CHUNK = 2**18


def load(
  directory: pathlib.Path,
  *,
  mesh: Mesh,
  dtype: Any = "float32",
  edits: Edits | None = None,
  config: DecoderConfig | None = None,
  report: Callable[[int], Any] = lambda size: None,
) -> tuple[DecoderConfig, Params]:
  """Architecture and stacked parameters as arrays on `mesh`, placed as `Decoder.shardings` says.

  Host memory beyond them stays below the largest tensor and a gigabyte, whatever the model's size.

  Args:
    directory: A model directory.
    mesh: Where the parameters go.
    dtype: float32, bfloat16 or float16; edits happen in float32 before.
    edits: By canonical name, what becomes of a parameter's blocks as they are read, or an array that takes its
      place, of whatever shape `config` has for it.
    config: The architecture after the edits, where it is not that of the directory.
    report: Told the number of bytes after every read of this process.

  Raises:
    InputError: What `hf.load` raises, or a value that `dtype` cannot hold; every process raises where one does.
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

    with bar, Reader(report=count) as reader:
      loader = _Loader(
        reader=reader, sources=sources, edits=edits, dtype=np.dtype(jnp.dtype(dtype)), where=str(directory)
      )
      params = {
        name: loader.parameter(
          decoder.canonical(name), shape=x.shape, sharding=shardings[name], stacked=name.startswith("groups.")
        )
        for name, x in decoder.abstract().items()
      }
  return config, params


def _bytes(decoder, shardings, sources, edits) -> int:
  """What this process is going to read, twins and what edits ask for apart."""
  total = 0
  for name, x in decoder.abstract().items():
    sizes = (_size(one) for one in _regions(shardings[name], x.shape))
    first = decoder.canonical(name)[0]
    total += 0 if isinstance(edits.get(first), np.ndarray) else sum(sizes) * sources[first].dtype.itemsize
  return total


def _size(region: Region) -> int:
  return math.prod(map(len, region))


def _regions(sharding: NamedSharding, shape: Sequence[int]) -> dict[Region, list[jax.Device]]:
  """Distinct regions that this process's devices hold, each with those devices."""
  regions: dict[Region, list[jax.Device]] = {}
  for device, index in sharding.addressable_devices_indices_map(tuple(shape)).items():
    region = tuple(range(size)[cut] for cut, size in zip(index or (), shape, strict=True))
    regions.setdefault(region, []).append(device)
  return regions


def _boxes(regions: Sequence[Region]) -> list[tuple[Block, list[Region]]]:
  """Blocks to read: one around all regions where they fill it, so that long rows are read at once; else each region."""
  box = tuple(
    slice(min(cut.start for cut in cuts), max(cut.stop for cut in cuts)) for cuts in zip(*regions, strict=True)
  )
  if math.prod(cut.stop - cut.start for cut in box) == sum(map(_size, regions)):
    return [(box, list(regions))]
  return [(tuple(slice(cut.start, cut.stop) for cut in region), [region]) for region in regions]


def _overlap(chunk: Block, region: Region) -> tuple[Block, Block] | None:
  """What the two share, as a block of the region and one of the chunk."""
  shared = [(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(chunk, region, strict=True)]
  if any(start >= stop for start, stop in shared):
    return None
  inside = tuple(slice(*(at - cut.start for at in ends)) for ends, cut in zip(shared, region, strict=True))
  out = tuple(slice(*(at - cut.start for at in ends)) for ends, cut in zip(shared, chunk, strict=True))
  return inside, out


class _Loader:
  """Makes one stacked parameter after another."""

  def __init__(
    self,
    *,
    reader: Reader,
    sources: Mapping[str, Source],
    edits: Edits,
    dtype: np.dtype,
    where: str,
  ):
    self._reader, self._sources, self._edits, self._dtype, self._where = reader, sources, edits, dtype, where

  def parameter(
    self, layers: list[str], *, shape: tuple[int, ...], sharding: NamedSharding, stacked: bool
  ) -> jax.Array:
    """The parameter on its devices, layers one stretch after another where all at once are too much for the host."""
    if not stacked:
      return self._stretch(layers, sharding=sharding, shape=shape, stacked=False)
    assert not sharding.spec or sharding.spec[0] is None, sharding
    held = sum(_size(region) for region in _regions(sharding, (1, *shape[1:])))
    count = max(1, _STRETCH // max(held * self._dtype.itemsize, 1))
    if count >= len(layers):
      return self._stretch(layers, sharding=sharding, shape=shape)
    whole = jax.jit(lambda: jnp.zeros(shape, self._dtype), out_shardings=sharding)()
    put = jax.jit(_put, donate_argnums=0, out_shardings=sharding)
    for start in range(0, len(layers), count):
      names = layers[start : start + count]
      part = self._stretch(names, sharding=sharding, shape=(len(names), *shape[1:]))
      whole = put(whole, part, start).block_until_ready()
    return whole

  def _stretch(self, names: list[str], *, sharding: NamedSharding, shape: tuple[int, ...], stacked: bool = True):
    """The array of some layers, or of one parameter that is not stacked."""
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
    # Else the host runs ahead, and its buffers wait in line for the devices.
    return jax.make_array_from_single_device_arrays(shape, sharding, shards).block_until_ready()

  def _fill(self, name: str, targets: Mapping[Region, np.ndarray]) -> None:
    """Reads one canonical parameter's regions into `targets`."""
    for box, regions in _boxes(list(targets)):
      for chunk, value in self._blocks(name, box):
        if value.dtype != self._dtype:
          with np.errstate(over="ignore", invalid="ignore"):
            value = value.astype(self._dtype)
          if not finite(value):
            raise InputError(f"{self._where}: {name} has values that {self._dtype} cannot hold; load it as bfloat16")
        for region in regions:
          if (shared := _overlap(chunk, region)) is not None:
            targets[region][shared[0]] = value[shared[1]]

  def _blocks(self, name: str, box: Block) -> Iterator[tuple[Block, np.ndarray]]:
    edit = self._edits.get(name)
    if isinstance(edit, np.ndarray):
      yield box, edit[box]
      return
    source = self._sources[name]

    def read(block: Block) -> np.ndarray:
      return source.read(self._reader, index=block)

    for chunk in source.chunks(box, size=_CHUNK):
      value = read(chunk)
      yield chunk, value if edit is None else edit(value.astype(np.float32), chunk, read)


def _put(whole: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(whole, part, start, 0)
