"""The training loop, shared by all kinds of training, which differ in their batch source."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh

from distill.parallel.mesh import to_global_batch
from distill.training.step import Metrics, TrainState
from distill.tree import Params
from distill.types import Batch

Step = Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]


@runtime_checkable
class BatchSource(Protocol):
  """Source of a stage's batches: text, a teacher cache, or text that the student generates."""

  def batch(self, step: int, params: Params) -> Batch:
    """Returns the batch of one step.

    Args:
      step: Number of the stage's steps already done, 0 for the first batch.
      params: All parameters at this step: `student.…`, `adapters.…` and `projectors.…`, stacked.

    Returns:
      This process's rows, as host arrays [B / processes, T].
    """
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hooks:
  """Callbacks of the training loop.

  Attributes:
    log: Called for every step with (steps done in the stage, metrics as floats); the call may come one step late.
    save: Called with the state after every step that `save_after` accepts, and after an interruption.
    save_after: Called with the steps done in the stage; returns True if a checkpoint is due.
    stop: Returns True if the run was asked to stop.
  """

  log: Callable[[int, dict[str, float]], None]
  save: Callable[[TrainState, int], None]
  save_after: Callable[[int], bool]
  stop: Callable[[], bool]


def run(
  state: TrainState,
  *,
  step: Step,
  teacher_params: Any,
  source: BatchSource,
  mesh: Mesh,
  start: int,
  steps: int,
  hooks: Hooks,
) -> tuple[TrainState, int]:
  """Trains from step `start` to step `steps` of a stage, or until asked to stop.

  Step n is dispatched before the metrics of step n - 1 are read, so that the device computes while they are logged.

  Args:
    state: State after `start` steps; it is donated to the first step.
    step: Training step: (state, teacher's parameters, global batch) -> (state, metrics).
    teacher_params: The teacher's parameters; an empty mapping without a teacher.
    source: Source of this process's rows of each batch.
    mesh: The devices that batches are spread over.
    start: Number of the stage's steps already done.
    steps: Length of the stage in steps, including those before `start`.
    hooks: Callbacks that log, save and stop.

  Returns:
    (state, number of the stage's steps done); the number is less than `steps` if the loop was asked to stop.
  """
  pending: tuple[int, Metrics] | None = None
  done = start
  while done < steps:
    batch = to_global_batch(source.batch(done, state.params), mesh=mesh)
    state, metrics = step(state, teacher_params, batch)
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
