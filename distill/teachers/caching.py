"""Runs a teacher over a token store, once, and keeps what it says."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import UInt32

from distill.data.store import TokenStore
from distill.parallel.mesh import batch_sharding, globally, replicated
from distill.teachers.cache import Rows, Section
from distill.teachers.live import LiveTeacher
from distill.types import Batch


def fill(
  section: Section,
  *,
  store: TokenStore,
  teacher: LiveTeacher,
  route: int,
  batch_size: int,
  mesh: Mesh,
  dtype: Any,
  stop: Callable[[], bool],
  report: Callable[[int], None],
) -> bool:
  """Makes the shards of `section` that are missing; processes share them out.

  Args:
    section: To fill; all processes see its directory.
    store: Whose rows they are.
    teacher: Live, with its parameters on `mesh`.
    route: Number of the adapter set that teaches the rows.
    batch_size: Rows the teacher runs at a time, of all processes together.
    mesh: Over all devices.
    dtype: Of the operands.
    stop: Whether somebody asked to stop; all processes ask at the same times.
    report: Told the number of rows after every batch.

  Returns:
    Whether everything is there; when stopped, whole shards are kept and the others begun anew the next time.
  """
  index, count = jax.process_index(), jax.process_count()
  share = batch_size // count
  run = _run(
    teacher, rows=section.rows, seed=section.manifest["seed"], fingerprint=store.fingerprint, dtype=dtype, mesh=mesh
  )
  missing = _agreed(section.missing())
  for first in range(0, len(missing), count):
    turn = missing[first : first + count]
    # Processes without a shard of their own run along with the last one's.
    bounds = [section.bounds(shard) for shard in turn]
    mine = bounds[min(index, len(turn) - 1)]
    packed: list[bytes] = []
    waiting: Any = None
    for at in range(0, max(map(len, bounds)), share):
      rows = np.minimum(mine.start + at + np.arange(share), mine.stop - 1)
      taught: Any = np.full(share, route, np.int32)
      batch = Batch(**store.read(rows), routes=taught)
      ahead = run(teacher.params, globally(batch, mesh=mesh), globally(rows.astype(np.uint32), mesh=mesh))
      packed += _packed(waiting, section.rows)
      waiting = ahead
      report(sum(max(0, min(share, len(one) - at)) for one in bounds))
      if stop():
        return False
    packed += _packed(waiting, section.rows)
    if index < len(turn):
      section.write(turn[index], packed[: len(mine)])
  return True


def _agreed(missing: list[int]) -> list[int]:
  """The shards that the first process misses."""
  if jax.process_count() == 1:
    return missing
  several = multihost_utils.broadcast_one_to_all(np.asarray([len(missing)]))
  padded = np.zeros(int(several[0]), np.int64)
  if jax.process_index() == 0:
    padded[:] = missing
  return multihost_utils.broadcast_one_to_all(padded).tolist()


def _run(teacher: LiveTeacher, *, rows: Rows, seed: int, fingerprint: str, dtype: Any, mesh: Mesh):
  """(parameters, batch, numbers of its rows) -> (what is kept of the distributions, hidden states), jitted."""

  def run(params, batch: Batch, numbers: UInt32[jax.Array, " B"]):
    signal = teacher.signal(params, batch=batch, capture=rows.layers, mixers=rows.mixers, dtype=dtype)
    key = jax.random.fold_in(jax.random.key(seed), int(fingerprint[:8], 16))
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(numbers)
    kept = rows.targets.keep(signal.hidden, signal.readout, keys=keys)
    return kept, tuple(state.astype(jnp.bfloat16) for state in (*signal.captured, *signal.mixed))

  here = batch_sharding(mesh)
  # Where one process holds all, nothing has to be gathered.
  out = here if jax.process_count() == 1 else replicated(mesh)
  return jax.jit(run, in_shardings=(teacher.shardings(mesh), here, here), out_shardings=out)


def _packed(found: Any, rows: Rows) -> Iterator[bytes]:
  """This process's rows of a batch, as bytes."""
  if found is None:
    return
  kept, states = jax.tree.map(_mine, found)
  for place in range(len(kept[0])):
    yield rows.pack(tuple(x[place] for x in kept), [x[place] for x in states])


def _mine(x: jax.Array) -> np.ndarray:
  if jax.process_count() == 1:
    return np.asarray(x)
  whole = np.asarray(x.addressable_data(0))
  share = len(whole) // jax.process_count()
  return whole[jax.process_index() * share :][:share]
