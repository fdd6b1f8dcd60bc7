"""Coordination of the processes of one computation: which one writes files, and how an error in one stops all."""

from collections.abc import Sequence
from types import TracebackType

import jax
import numpy as np
from jax.experimental import multihost_utils

from distill.errors import InputError


def is_writer() -> bool:
  """Returns True on process 0, which alone prints and writes the files of the whole run."""
  return jax.process_index() == 0


def gather_flags(flag: bool) -> np.ndarray:
  """Returns the `flag` of every process, in process order; all processes must call this at the same point."""
  if jax.process_count() == 1:
    return np.asarray([flag])
  return np.asarray(multihost_utils.process_allgather(np.asarray(flag)))


def broadcast_numbers(numbers: Sequence[int]) -> list[int]:
  """Returns, on every process, the `numbers` that process 0 passed; all processes must call this at the same point."""
  if jax.process_count() == 1:
    return list(numbers)
  # The length goes first: a broadcast needs arrays of one shape on all processes.
  length = multihost_utils.broadcast_one_to_all(np.asarray([len(numbers)]))
  padded = np.zeros(int(length[0]), np.int64)
  if is_writer():
    padded[:] = numbers
  return multihost_utils.broadcast_one_to_all(padded).tolist()


def local_rows(x: jax.Array) -> np.ndarray:
  """Returns the rows of `x` that this process's devices hold, in row order; `x` is sharded by rows."""
  parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
  return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


class fail_together:
  """A context manager for work that each process does on its own: an error on one process raises an error on all.

  Without this context, the processes without an error would wait forever at their next collective. Contexts may be
  nested. Only the outermost one synchronises the processes, so the work inside it must not use collectives.

  Args:
    what: A file or key, which begins the error message on the processes that did not fail themselves.

  Raises:
    InputError: Another process failed. Raised on exit.
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
      failed_process = int(np.argmax(failed))
      raise InputError(
        f"{self._what}: process {failed_process} failed, so this process stops too; fix the error that process "
        f"{failed_process} printed"
      )
