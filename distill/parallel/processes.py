"""Errors that all processes learn of, so that none waits at a collective for one that has stopped."""

from types import TracebackType

import jax
import numpy as np
from jax.experimental import multihost_utils

from distill.errors import InputError


class fail_together:
  """Context of work that each process does by itself; where it fails in one, it fails in all.

  Of contexts inside one another, only the outermost meets the other processes: there must be no collective in it.

  Args:
    what: Of the message that the other processes raise.
  """

  _depth = 0

  def __init__(self, what: str):
    self._what = what

  def __enter__(self) -> None:
    fail_together._depth += 1

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
    fail_together._depth -= 1
    if fail_together._depth or jax.process_count() == 1 or (kind is not None and not issubclass(kind, Exception)):
      return
    failed = multihost_utils.process_allgather(np.asarray(kind is not None))
    if kind is None and failed.any():
      raise InputError(f"{self._what}: process {int(np.argmax(failed))} failed; its own message says why")
