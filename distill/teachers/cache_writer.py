"""Runs a live teacher over token stores and writes its signal into a teacher cache."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Key, UInt32

from distill.data.store import TokenStore
from distill.parallel.mesh import batch_sharding, replicated, to_global_batch
from distill.parallel.processes import broadcast_numbers, fail_together, local_rows
from distill.teachers.live import LiveTeacher
from distill.teachers.row_format import RowFormat
from distill.teachers.sections import Section
from distill.types import Batch


class CacheWriter:
  """Runs a live teacher over token stores and writes its signal into sections of a teacher cache.

  Args:
    teacher: The teacher, its parameters on `mesh`.
    format: Encoding of a row, the same in all sections.
    mesh: Mesh of all devices.
    dtype: Dtype of the operands of the teacher's matmuls.
  """

  def __init__(self, teacher: LiveTeacher, *, format: RowFormat, mesh: Mesh, dtype: Any):
    self._teacher, self._format, self._mesh = teacher, format, mesh
    capture = format.capture

    def run(params, batch: Batch, numbers: UInt32[jax.Array, " B"], key: Key[jax.Array, ""]):
      signal = teacher.signal(params, batch=batch, capture=capture, dtype=dtype)
      keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)
      targets = format.targets.select(signal.hidden, signal.readout, keys=keys)
      activations = [signal.layers[i] for i in capture.layers] + [signal.mixers[i] for i in capture.mixers]
      return targets, tuple(x.astype(jnp.bfloat16) for x in activations)

    rows = batch_sharding(mesh)
    self._run = jax.jit(run, in_shardings=(teacher.shardings(mesh), rows, rows, replicated(mesh)), out_shardings=rows)

  def fill(
    self,
    section: Section,
    *,
    store: TokenStore,
    route: int,
    stop: Callable[[], bool],
    report: Callable[[int], None],
  ) -> bool:
    """Writes the missing shards of a section; each process writes one shard at a time.

    Args:
      section: The section; all processes see its directory.
      store: Token store whose rows the section is for.
      route: Index of the adapter set that the teacher uses for these rows.
      stop: Returns True once the run is asked to stop; all processes call it at the same points.
      report: Called after every batch with the number of rows that all processes together computed in it.

    Returns:
      True if the section is complete, False after a stop. After a stop, finished shards stay on disk, and the next call
      writes the others from their beginning.
    """
    index, count = jax.process_index(), jax.process_count()
    missing = broadcast_numbers(section.missing())
    for first in range(0, len(missing), count):
      turn = missing[first : first + count]
      bounds = [section.bounds(shard) for shard in turn]
      # Every process has to take part in each step: without a shard of its own it repeats the last one's rows.
      mine = bounds[min(index, len(turn) - 1)]
      packed: list[bytes] = []
      for at, rows in self._packed(section, store, route, mine, max_rows=max(map(len, bounds))):
        packed += rows
        report(sum(max(0, min(len(rows), len(one) - at)) for one in bounds))
        if len(packed) < max(map(len, bounds)) and stop():
          return False
      with fail_together(str(section.directory)):
        if index < len(turn):
          section.write(turn[index], packed[: len(mine)])
    return True

  def _packed(self, section, store, route, mine: range, *, max_rows: int) -> Iterator[tuple[int, list[bytes]]]:
    """Yields, for each batch of this process's shard, (number of shard rows before it, bytes of each of its rows).

    A shard shorter than `max_rows` is filled up with its last row, so that all processes run the same number of
    batches. The device computes the next batch while the host packs one.

    Args:
      section: As `fill`.
      store: As `fill`.
      route: As `fill`.
      mine: Indices in the store of the rows to compute: those of this process's shard or, if this process has none to
        write, those of the last shard that the other processes are writing.
      max_rows: Number of rows of the longest shard that the processes write at once.
    """
    share = section.manifest["batch_size"] // jax.process_count()
    key = jax.random.fold_in(jax.random.key(section.manifest["seed"]), int(store.fingerprint[:8], 16))
    previous: Any = None
    for at in range(0, max_rows, share):
      rows = np.minimum(mine.start + at + np.arange(share), mine.stop - 1)
      routes: Any = np.full(share, route, np.int32)
      batch, numbers = to_global_batch(
        (Batch(**store.read(rows), routes=routes), rows.astype(np.uint32)), mesh=self._mesh
      )
      current = self._run(self._teacher.params, batch, numbers, key)
      if previous is not None:
        yield at - share, self._bytes(previous)
      previous = current
    yield at, self._bytes(previous)

  def _bytes(self, outputs: Any) -> list[bytes]:
    targets, activations = jax.tree.map(local_rows, outputs)
    return [
      self._format.pack([x[row] for x in targets], [x[row] for x in activations]) for row in range(len(targets[0]))
    ]
