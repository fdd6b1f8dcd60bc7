"""Runs a teacher over token stores, once, and keeps what it says."""

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
from distill.teachers.cache import Rows, Section
from distill.teachers.live import LiveTeacher
from distill.types import Batch, Capture


class CacheWriter:
  """Fills sections of a cache from a live teacher.

  Args:
    teacher: With its parameters on `mesh`.
    rows: How rows of all sections are packed.
    mesh: Over all devices.
    dtype: Of the operands.
  """

  def __init__(self, teacher: LiveTeacher, *, rows: Rows, mesh: Mesh, dtype: Any):
    self._teacher, self._rows, self._mesh = teacher, rows, mesh

    def run(params, batch: Batch, numbers: UInt32[jax.Array, " B"], key: Key[jax.Array, ""]):
      capture = Capture(layers=rows.layers, mixers=rows.mixers)
      signal = teacher.signal(params, batch=batch, capture=capture, dtype=dtype)
      keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)
      kept = rows.targets.keep(signal.hidden, signal.readout, keys=keys)
      states = [signal.layers[one] for one in rows.layers] + [signal.mixers[one] for one in rows.mixers]
      return kept, tuple(state.astype(jnp.bfloat16) for state in states)

    here = batch_sharding(mesh)
    self._run = jax.jit(run, in_shardings=(teacher.shardings(mesh), here, here, replicated(mesh)), out_shardings=here)

  def fill(
    self,
    section: Section,
    *,
    store: TokenStore,
    route: int,
    stop: Callable[[], bool],
    report: Callable[[int], None],
  ) -> bool:
    """Makes the shards of `section` that are missing; processes share them out.

    Args:
      section: To fill; all processes see its directory.
      store: Whose rows they are.
      route: Number of the adapter set that teaches them.
      stop: Whether somebody asked to stop; all processes ask at the same times.
      report: Told the number of rows after every batch.

    Returns:
      Whether everything is there; when stopped, whole shards are kept and the others begun anew the next time.
    """
    index, count = jax.process_index(), jax.process_count()
    missing = broadcast_numbers(section.missing())
    for first in range(0, len(missing), count):
      turn = missing[first : first + count]
      bounds = [section.bounds(shard) for shard in turn]
      # Processes without a shard of their own run along with the last one's.
      mine = bounds[min(index, len(turn) - 1)]
      packed: list[bytes] = []
      for at, rows in self._packed(section, store, route, mine, steps=max(map(len, bounds))):
        packed += rows
        report(sum(max(0, min(len(rows), len(one) - at)) for one in bounds))
        if len(packed) < max(map(len, bounds)) and stop():
          return False
      with fail_together(str(section.directory)):
        if index < len(turn):
          section.write(turn[index], packed[: len(mine)])
    return True

  def _packed(self, section, store, route, mine: range, *, steps: int) -> Iterator[tuple[int, list[bytes]]]:
    """(first row within the shard, packed rows) of each batch; the next one runs while one is packed."""
    share = section.manifest["batch_size"] // jax.process_count()
    key = jax.random.fold_in(jax.random.key(section.manifest["seed"]), int(store.fingerprint[:8], 16))
    before: Any = None
    for at in range(0, steps, share):
      rows = np.minimum(mine.start + at + np.arange(share), mine.stop - 1)
      routes: Any = np.full(share, route, np.int32)
      batch, numbers = to_global_batch(
        (Batch(**store.read(rows), routes=routes), rows.astype(np.uint32)), mesh=self._mesh
      )
      found = self._run(self._teacher.params, batch, numbers, key)
      if before is not None:
        yield at - share, self._bytes(before)
      before = found
    yield at, self._bytes(before)

  def _bytes(self, found: Any) -> list[bytes]:
    kept, states = jax.tree.map(local_rows, found)
    return [self._rows.pack(tuple(x[place] for x in kept), [x[place] for x in states]) for place in range(len(kept[0]))]
