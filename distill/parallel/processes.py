"""Agreement between the processes of a computation: who writes, and how all fail together."""

from collections.abc import Sequence
from types import TracebackType

import jax
import numpy as np
from jax.experimental import multihost_utils

from distill.errors import InputError


def is_writer() -> bool:
  """Returns True on the one process that prints and writes files which belong to the whole run."""
  return jax.process_index() == 0


def gather_flags(flag: bool) -> np.ndarray:
  """Returns the `flag` of every process, in process order; all processes must call it at the same time."""
  if jax.process_count() == 1:
    return np.asarray([flag])
  return np.asarray(multihost_utils.process_allgather(np.asarray(flag)))


def broadcast_numbers(numbers: Sequence[int]) -> list[int]:
  """Returns, on every process, the `numbers` that the writer passed; all processes must call it at the same time."""
  if jax.process_count() == 1:
    return list(numbers)
  # The length goes first: a broadcast needs arrays of one shape on all processes.
  length = multihost_utils.broadcast_one_to_all(np.asarray([len(numbers)]))
  padded = np.zeros(int(length[0]), np.int64)
  if is_writer():
    padded[:] = numbers
  return multihost_utils.broadcast_one_to_all(padded).tolist()


def local_rows(x: jax.Array) -> np.ndarray:
  """Returns the rows of a row-sharded array that this process's devices hold, in order."""
  parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
  return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


class fail_together:
  """A context for work that each process does on its own: if it fails on one process, it fails on all.

  Without it, the other processes would wait forever at their next collective. Contexts may be nested; only the
  outermost one synchronises, so there must be no collective inside it.

  Args:
    what: Start of the error message on the other processes, such as a file or key.

  Raises:
    InputError: On exit, on the processes that did not fail themselves.
  """

  _depth = 0

  def __init__(self, what: str):
    self._what = what

  def __enter__(self) -> None:
    fail_together._depth += 1

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
    fail_together._depth -= 1
    # An interrupted process leaves at once: the others may be anywhere.
    if fail_together._depth or (kind is not None and not issubclass(kind, Exception)):
      return
    failed = gather_flags(kind is not None)
    if kind is None and failed.any():
      raise InputError(f"{self._what}: process {int(np.argmax(failed))} failed; its own error message says why")
