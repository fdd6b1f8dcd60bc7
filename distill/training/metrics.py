"""Metrics of a run: JSON lines, TensorBoard, and progress on the terminal."""

import json
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import tensorboardX
from tqdm import tqdm

from distill.files.replace import replace_file


class MetricsWriter:
  """Appends metrics to a file of JSON lines and to TensorBoard.

  Args:
    path: The file of JSON lines.
    tensorboard: Directory of the TensorBoard events.
    step: Number of steps done; lines of later steps, left by a run interrupted after its last checkpoint, are deleted.
  """

  def __init__(self, path: pathlib.Path, *, tensorboard: pathlib.Path, step: int):
    earlier = [line for line in _lines(path) if json.loads(line)["step"] <= step]
    with replace_file(path) as work:
      work.write_text("".join(earlier))
    self._file = path.open("a")
    self._board = tensorboardX.SummaryWriter(str(tensorboard), purge_step=step + 1)

  def write(self, step: int, values: Mapping[str, float | str]) -> None:
    """Writes one JSON line, and a TensorBoard point for every number."""
    self._file.write(json.dumps({"step": step, **values}) + "\n")
    self._file.flush()
    for name, value in values.items():
      if not isinstance(value, str):
        self._board.add_scalar(name, value, step)

  def close(self) -> None:
    """Closes the JSON lines and the TensorBoard events."""
    self._file.close()
    self._board.close()


def summary(path: pathlib.Path) -> str:
  """Returns a text table of the stages in a metrics file: steps, tokens, minutes, and loss at start and end.

  The losses are means over the first and the last 5 % of the stage's lines.
  """
  stages: dict[str, list[dict[str, Any]]] = {}
  for line in read_metrics(path):
    stages.setdefault(line["stage"], []).append(line)
  width = max((len(name) for name in stages), default=0)
  rows = [f"{'stage':<{width}}  {'steps':>7}  {'tokens':>13}  {'minutes':>7}  loss"]
  done = 0
  for name, lines in stages.items():
    steps, done = lines[-1]["step"] - done, lines[-1]["step"]
    few = max(1, len(lines) // 20)
    first, last = (sum(line["loss"] for line in part) / few for part in (lines[:few], lines[-few:]))
    tokens = sum(line["tokens"] for line in lines)
    minutes = sum(line["tokens"] / max(line["tokens_per_second"], 1e-9) for line in lines) / 60
    rows.append(f"{name:<{width}}  {steps:>7}  {tokens:>13,.0f}  {minutes:>7.1f}  {first:.4f} -> {last:.4f}")
  return "\n".join(rows)


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the lines of a metrics file as dicts, without an incomplete last line; [] if the file does not exist."""
  return list(map(json.loads, _lines(path)))


def _lines(path: pathlib.Path) -> list[str]:
  """Returns the lines of a file, without an incomplete last line; [] if the file does not exist."""
  if not path.exists():
    return []
  return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


class Progress:
  """Shows progress, speed and time left: a bar on a terminal, a line every ten seconds elsewhere.

  Args:
    name: Name of the stage.
    done: Number of steps already done.
    total: Number of steps in all, including those already done.
    unit: Word for one of the steps, in the display.
    stream: Stream that the display is written to.
  """

  def __init__(self, name: str, *, done: int, total: int, unit: str = "step", stream: TextIO = sys.stderr):
    self._name, self._done, self._total, self._unit, self._stream = name, done, total, unit, stream
    self._first = self._last_done = done
    self._start = self._last = time.monotonic()
    self._tokens = self._last_tokens = 0.0
    self._bar = tqdm(total=total, initial=done, desc=name, unit=unit, file=stream) if stream.isatty() else None

  def update(self, done: int, *, tokens: float, note: str = "") -> None:
    """Updates the display after a step.

    Args:
      done: Number of steps done.
      tokens: Number of tokens in the last step.
      note: Text to show before the speed.
    """
    self._tokens += tokens
    now = time.monotonic()
    rate = self._tokens / max(now - self._start, 1e-9)
    if self._bar is not None:
      self._bar.set_postfix_str(f"{note}{rate:,.0f} tokens/s", refresh=False)
      self._bar.update(done - self._done)
    elif now - self._last >= 10 or done == self._total:
      recent = (self._tokens - self._last_tokens) / max(now - self._last, 1e-9)
      speed = (done - self._last_done) / max(now - self._last, 1e-9)
      left = (self._total - done) / max(speed, 1e-9)
      print(
        f"{self._name}: {self._unit} {done}/{self._total}, {note}{recent:,.0f} tokens/s, {_clock(left)} left",
        file=self._stream,
        flush=True,
      )
      self._last, self._last_done, self._last_tokens = now, done, self._tokens
    self._done = done

  def close(self) -> None:
    """Closes the progress bar, if there is one."""
    if self._bar is not None:
      self._bar.close()


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
