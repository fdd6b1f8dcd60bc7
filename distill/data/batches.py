"""Batches of packed text, as a pure function of (seed, step)."""

import concurrent.futures
import copy
import math
from collections.abc import Callable, Sequence

import grain
import jax
import numpy as np
from jaxtyping import Int

from distill.data.store import TokenStore
from distill.errors import InputError
from distill.tree import Params
from distill.types import Batch, SparseSignal

_AHEAD = 2


class _StoreRows:
  """A token store as a Grain source: item i is (index of the store, row index i)."""

  def __init__(self, number: int, store: TokenStore):
    self._number, self._store = number, store

  def __len__(self) -> int:
    return self._store.rows

  def __getitem__(self, row: int) -> tuple[int, int]:
    return self._number, int(row)


class Batches:
  """Endless batches of a weighted mixture of token stores; a batch depends only on the seed and the step.

  Args:
    stores: Token stores whose rows all have the same length.
    weights: Relative share of each store in the rows drawn; a store is shuffled again for every epoch.
    batch_size: Number of rows B of the global batch.
    seed: Seed of the shuffling.
    routes: For each store, the index of the adapter set that teaches its rows; by default set 0 for every store.
    first: Number of rows that earlier stages took from these stores; the batches continue after them.
    rows: Which rows of each global batch this process reads, in ascending order; None for all.

  Raises:
    InputError: The stores' row lengths differ, or a weight is not positive and finite.
  """

  def __init__(
    self,
    stores: Sequence[TokenStore],
    *,
    weights: Sequence[float],
    batch_size: int,
    seed: int,
    routes: Sequence[int] = (),
    first: int = 0,
    rows: Sequence[int] | None = None,
  ):
    if len({store.length for store in stores}) != 1:
      lengths = sorted({store.length for store in stores})
      raise InputError(f"data: the token stores have rows of different lengths {lengths}; use stores of one row length")
    if len(weights) != len(stores) or not all(0 < weight < math.inf for weight in weights):
      raise InputError(
        f"data: the weights {tuple(weights)} are invalid; give a positive, finite weight for each of the {len(stores)} "
        "sources"
      )
    self._routes = np.asarray(routes or [0] * len(stores), np.int32)
    self._stores, self._size, self._first = tuple(stores), batch_size, first
    self._mine = range(batch_size) if rows is None else rows
    self._signals: tuple[Callable[[Int[np.ndarray, " B"]], SparseSignal], ...] = ()
    # Batches that a thread is reading, by step; the thread ends with the last reference to its executor.
    self._ahead: dict[int, concurrent.futures.Future[Batch]] = {}
    self._reader = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="batches")
    parts = [
      grain.MapDataset.source(_StoreRows(i, store)).seed(seed + i).shuffle().repeat() for i, store in enumerate(stores)
    ]
    self._rows = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights=list(map(float, weights)))

  @property
  def stores(self) -> tuple[TokenStore, ...]:
    """The token stores, in the order in which they were given."""
    return self._stores

  def with_signals(self, signals: Sequence[Callable[[Int[np.ndarray, " B"]], SparseSignal]]) -> "Batches":
    """Returns the same batches, each with the teacher's signal for its rows.

    Args:
      signals: One function for each token store. It takes the indices of rows in that store [B], and returns the
        teacher's signal for them [B, T, …] from a teacher cache.
    """
    copied = copy.copy(self)
    copied._ahead = {}
    copied._signals = tuple(signals)
    return copied

  @property
  def size(self) -> int:
    """Number of rows of the global batch."""
    return self._size

  def __getitem__(self, step: int) -> Batch:
    """Returns this process's rows of the global batch of `step`."""
    first = self._first + step * self._size
    chosen = [self._rows[first + row] for row in map(int, self._mine)]
    slots, parts = [], []
    for number, store in enumerate(self._stores):
      here = [slot for slot, (owner, _) in enumerate(chosen) if owner == number]
      if not here:
        continue
      rows = np.asarray([chosen[slot][1] for slot in here])
      signal = {"signal": self._signals[number](rows)} if self._signals else {}
      slots.append(here)
      parts.append({**store.read(rows), "routes": np.full(len(here), self._routes[number]), **signal})

    def joined(*values: np.ndarray) -> np.ndarray:
      whole = np.zeros((len(chosen), *values[0].shape[1:]), values[0].dtype)
      for here, value in zip(slots, values, strict=True):
        whole[here] = value
      return whole

    return Batch(**jax.tree.map(joined, *parts))

  def batch(self, step: int, params: Params) -> Batch:
    """Returns this process's rows of the global batch of `step`, and starts a thread that reads the next batches.

    `params`, the parameters at this step, are ignored: they are for batches that the student generates.
    """
    del params  # Text does not depend on the student.
    for ahead in range(step, step + 1 + _AHEAD):
      if ahead not in self._ahead:
        self._ahead[ahead] = self._reader.submit(self.__getitem__, ahead)
    batch = self._ahead[step].result()
    self._ahead = {ahead: future for ahead, future in self._ahead.items() if ahead > step}
    return batch
