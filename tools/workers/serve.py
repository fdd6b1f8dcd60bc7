"""Runs benchmark programs as workers in their own processes and environments, so that they take turns.

Imports only the standard library, because a worker's environment may have nothing else that distill needs.
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
  """A process that prepares a measurement, and takes it once for each call of `round`.

  Args:
    module: Module to run, which calls `serve`.
    python: Interpreter of its environment; if it is missing, this program exits and names the script that creates it.
    settings: Settings of the measurement, which the process gets as JSON.

  Attributes:
    ready: First message of the process, after its preparation.
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
    """Lets the process run one round, and returns its measurements."""
    assert self._process.stdin is not None
    self._process.stdin.write("\n")
    self._process.stdin.flush()
    return self._read()

  def close(self) -> None:
    """Kills the process."""
    self._process.kill()
    self._process.wait()

  def _read(self) -> dict[str, Any]:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      raise SystemExit(
        f"{self._process.args[2]}: the worker ended with exit code {self._process.wait()}; see its error above"
      )
    return json.loads(line)


def environment(name: str) -> pathlib.Path:
  """Returns the Python interpreter of the environment of a peer, a library that distill is measured against.

  Raises:
    SystemExit: The environment does not exist.
  """
  python = _ROOT / ".peers" / name / "bin" / "python"
  if not python.exists():
    print(f"{python.relative_to(_ROOT)}: no such file; create it with tools/bench_peers.sh {name}", file=sys.stderr)
    raise SystemExit(2)
  return python


def serve(prepare: Callable[[Mapping[str, Any]], tuple[dict[str, Any], Callable[[], dict[str, Any]]]]) -> None:
  """Runs this process as a worker: writes a JSON line when it is ready, and one for each line on stdin.

  What libraries print goes to stderr.

  Args:
    prepare: Function of the settings that returns (first message, function that returns a round's measurements).
  """
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
  """Resets this process's peak memory to what it holds now."""
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
  """Runs `rounds` rounds, in each of which the workers take turns; returns the measurements of each worker.

  A warm-up round comes first and is not counted, because some programs compile again in it. Progress goes to stderr.
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
