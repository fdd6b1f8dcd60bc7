"""The one loop."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

from distill.training.step import Metrics, TrainState
from distill.types import Batch

Step = Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hooks:
  """What the loop tells the outside.

  Attributes:
    log: Called with (steps done in the stage, metrics as floats), once a step, one step late.
    save: Called with the state after every step that `save_after` accepts, and after an interruption.
    save_after: Whether to save when so many steps of the stage are done.
    stop: Whether somebody asked to stop.
  """

  log: Callable[[int, dict[str, float]], None]
  save: Callable[[TrainState, int], None]
  save_after: Callable[[int], bool]
  stop: Callable[[], bool]


def run(
  state: TrainState, *, step: Step, teacher_params: Any, batches: Iterator[Batch], start: int, steps: int, hooks: Hooks
) -> tuple[TrainState, int]:
  """Trains from `start` steps done to `steps`, or until asked to stop.

  Step n is dispatched before the metrics of step n − 1 are read, so that logging never waits for the device.

  Returns:
    The state, and how many steps of the stage are done.
  """
  pending: tuple[int, Metrics] | None = None
  done = start
  while done < steps:
    state, metrics = step(state, teacher_params, next(batches))
    done += 1
    if pending is not None:
      _report(hooks, *pending)
    pending = (done, metrics)
    stopping = hooks.stop()
    if stopping or hooks.save_after(done):
      _report(hooks, *pending)
      pending = None
      hooks.save(state, done)
    if stopping:
      break
  if pending is not None:
    _report(hooks, *pending)
  return state, done


def _report(hooks: Hooks, done: int, metrics: Metrics) -> None:
  hooks.log(done, {name: float(value) for name, value in jax.device_get(metrics).items()})
