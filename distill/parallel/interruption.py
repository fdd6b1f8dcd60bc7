"""Signals that ask a run to save and stop."""

import signal
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again.


class Interruption:
  """Context in which SIGTERM or SIGINT asks to stop; a second SIGINT ends the process at once."""

  def __init__(self) -> None:
    self._asked = False
    self._before: dict[signal.Signals, object] = {}

  def __enter__(self) -> "Interruption":
    for number in (signal.SIGTERM, signal.SIGINT):
      self._before[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *unused) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)  # type: ignore[arg-type]

  def _handle(self, number: int, frame: FrameType | None) -> None:
    if self._asked and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._asked = True

  def requested(self) -> bool:
    """Whether any process of the run was asked to stop; all of them must call it at the same step."""
    if jax.process_count() == 1:
      return self._asked
    return bool(multihost_utils.process_allgather(np.asarray(self._asked)).any())
