"""Signals that ask a run to save its state and stop."""

import signal
from types import FrameType

from distill.parallel.processes import gather_flags

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again.


class Interruption:
  """A context manager in which SIGTERM or SIGINT only requests a stop; the method `requested` reports the request.

  A SIGINT after such a request raises KeyboardInterrupt at once.
  """

  def __init__(self) -> None:
    self._requested = False
    self._previous: dict[signal.Signals, object] = {}

  def __enter__(self) -> "Interruption":
    for number in (signal.SIGTERM, signal.SIGINT):
      self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *unused) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)  # type: ignore[arg-type]

  def _handle(self, number: int, frame: FrameType | None) -> None:
    if self._requested and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._requested = True

  def requested(self) -> bool:
    """Returns True if any process of the run was asked to stop.

    All processes must call this method at the same step, because they exchange their answers.
    """
    return bool(gather_flags(self._requested).any())
