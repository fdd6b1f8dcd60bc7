"""Batches as a pure function of (seed, step)."""

import collections
import concurrent.futures
import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import grain
import jax
import numpy as np
from jaxtyping import Int

from distill.data.store import TokenStore
from distill.errors import InputError
from distill.types import Batch, SparseSignal

_AHEAD = 2


class _Rows:
  """A store as a Grain source: item i is (store, row)."""

  def __init__(self, number: int, store: TokenStore):
    self._number, self._store = number, store

  def __len__(self) -> int:
    return self._store.rows

  def __getitem__(self, row: int) -> tuple[int, int]:
    return self._number, int(row)


class Batches:
  """Endless batches of a weighted mixture of stores; batch `step` is the same whoever asks, whenever.

  Args:
    stores: Token stores with rows of one length.
    weights: Share of each in the rows drawn; every store is shuffled anew each time it has been gone through.
    batch_size: Rows of the global batch.
    seed: Of the shuffling.
    routes: Number of the adapter set that teaches the rows of each store; all 0 unless given.
    first: Rows drawn before step 0, by stages that read the same stores.
    process: (index, count): this host's part of each batch, an equal run of consecutive rows.

  Raises:
    InputError: Lengths differ, a weight is not positive, or the batch does not divide among the hosts.
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
    process: tuple[int, int] = (0, 1),
  ):
    if len({store.length for store in stores}) != 1:
      raise InputError(f"data: stores of different row lengths {sorted({store.length for store in stores})}")
    if len(weights) != len(stores) or not all(0 < weight < math.inf for weight in weights):
      raise InputError(f"data: weights {tuple(weights)}; each of the {len(stores)} sources needs a positive one")
    if batch_size % process[1]:
      raise InputError(f"training.batch_size: {batch_size} does not divide among {process[1]} hosts")
    self._routes = np.asarray(routes or [0] * len(stores), np.int32)
    self._stores, self._size, self._first, self._process = tuple(stores), batch_size, first, process
    self._known: tuple[Callable[[Int[np.ndarray, " N"]], SparseSignal], ...] = ()
    parts = [
      grain.MapDataset.source(_Rows(i, store)).seed(seed + i).shuffle().repeat() for i, store in enumerate(stores)
    ]
    self._rows = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights=list(map(float, weights)))

  @property
  def stores(self) -> tuple[TokenStore, ...]:
    """The stores, in the order of the sources."""
    return self._stores

  def beside(self, known: Sequence[Callable[[Int[np.ndarray, " N"]], SparseSignal]]) -> "Batches":
    """The same batches with what a cache has for their rows, by the numbers of the rows of each store."""
    copied = copy.copy(self)
    copied._known = tuple(known)
    return copied

  @property
  def size(self) -> int:
    """Rows of the global batch."""
    return self._size

  def __getitem__(self, step: int) -> Batch:
    """This host's rows of the global batch of `step`."""
    index, count = self._process
    share = self._size // count
    first = self._first + step * self._size + index * share
    chosen = [self._rows[i] for i in range(first, first + share)]
    slots, parts = [], []
    for number, store in enumerate(self._stores):
      here = [slot for slot, (owner, _) in enumerate(chosen) if owner == number]
      if not here:
        continue
      rows = np.asarray([chosen[slot][1] for slot in here])
      known = {"signal": self._known[number](rows)} if self._known else {}
      slots.append(here)
      parts.append({**store.read(rows), "routes": np.full(len(here), self._routes[number]), **known})

    def joined(*values: np.ndarray) -> np.ndarray:
      whole = np.zeros((share, *values[0].shape[1:]), values[0].dtype)
      for here, value in zip(slots, values, strict=True):
        whole[here] = value
      return whole

    return Batch(**jax.tree.map(joined, *parts))

  def iterate(self, start: int) -> Iterator[Batch]:
    """Batches from step `start` on, read ahead by a thread that ends with the iterator."""
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="batches") as reader:
      ahead = collections.deque(reader.submit(self.__getitem__, start + i) for i in range(_AHEAD))
      for step in itertools.count(start + _AHEAD):
        yield ahead.popleft().result()
        ahead.append(reader.submit(self.__getitem__, step))
