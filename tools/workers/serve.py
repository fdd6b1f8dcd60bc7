"""Programs in environments of their own that time a round whenever they are asked, so that peers run in turns.

Nothing but the standard library: the environments hold what the peers need and no more.
"""

import contextlib
import ctypes
import gc
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

_ROOT = pathlib.Path(__file__).parents[2]
_STATUS = pathlib.Path("/proc/self/status")


class Worker:
  """A program that has set itself up with `settings` and waits for `round`.

  Args:
    module: Module to run, which calls `serve`.
    python: Interpreter of its environment; if it is missing, this program exits and names the script that creates it.
    settings: Argument of the program, as JSON.
  """

  def __init__(self, module: str, *, python: pathlib.Path | str = sys.executable, settings: Mapping[str, Any]):
    self._process = subprocess.Popen(
      [str(python), "-m", module, json.dumps(settings)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      cwd=_ROOT,
    )
    self.ready = self._read()

  def round(self) -> dict[str, Any]:
    """Returns the measurements of one round."""
    assert self._process.stdin is not None
    self._process.stdin.write("\n")
    self._process.stdin.flush()
    return self._read()

  def close(self) -> None:
    """Ends the program."""
    self._process.kill()
    self._process.wait()

  def _read(self) -> dict[str, Any]:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      raise SystemExit(f"{self._process.args[2]} ended with exit code {self._process.wait()}")
    return json.loads(line)


def environment(name: str) -> pathlib.Path:
  """Returns the Python interpreter of a peer's environment.

  Raises:
    SystemExit: The environment does not exist.
  """
  python = _ROOT / ".peers" / name / "bin" / "python"
  if not python.exists():
    print(f"{python.relative_to(_ROOT)}: not there; make it: tools/bench_peers.sh {name}", file=sys.stderr)
    raise SystemExit(2)
  return python


def serve(prepare: Callable[[Mapping[str, Any]], tuple[dict[str, Any], Callable[[], dict[str, Any]]]]) -> None:
  """Runs a worker: `prepare(settings)` returns its first message and the round to time; libraries print to stderr."""
  with contextlib.redirect_stdout(sys.stderr):
    ready, run = prepare(json.loads(sys.argv[1]))
    _say(ready)
    for _ in sys.stdin:
      _say(run())


def _say(values: Mapping[str, Any]) -> None:
  assert sys.__stdout__ is not None
  print(json.dumps(values), file=sys.__stdout__, flush=True)


def resident() -> int:
  """Returns the resident bytes of this process, after free memory was returned to the system."""
  gc.collect()
  with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL("libc.so.6").malloc_trim(0)
  return _status("VmRSS")


def forget_peak() -> None:
  """Resets the peak to the memory that the process holds now."""
  resident()
  pathlib.Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
  """Returns the peak resident bytes of this process since `forget_peak`."""
  return _status("VmHWM")


def available() -> int:
  """Returns the bytes that a process can still allocate without swapping."""
  line = next(
    line for line in pathlib.Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable")
  )
  return int(line.split()[1]) * 1024


def _status(key: str) -> int:
  line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key))
  return int(line.split()[1]) * 1024


def in_turns(workers: Mapping[str, Worker], *, rounds: int) -> dict[str, list[dict[str, Any]]]:
  """Returns the measurements of each worker; the workers take turns within a round. Progress goes to stderr.

  A round before the first is not counted, because some programs compile again in it.
  """
  found: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
  for turn in range(rounds + 1):
    for name, worker in workers.items():
      measured = worker.round()
      print(f"  round {turn}/{rounds}  {name:<12} {measured['seconds']:8.3f} s", file=sys.stderr)
      if turn:
        found[name].append(measured)
  return found


def cores() -> int:
  """Returns the number of cores that this process may use."""
  return len(os.sched_getaffinity(0))
