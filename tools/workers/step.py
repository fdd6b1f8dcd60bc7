"""Times training steps of distill on checkpoints, for tools/bench_step.py."""

import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distill.checkpoints import hf
from distill.models.decoder import Decoder
from distill.objectives.cross_entropy import CrossEntropy
from distill.objectives.divergence_terms import ForwardKl
from distill.parallel.mesh import make_mesh, replicated, to_global_batch
from distill.teachers.live import LiveTeacher
from distill.training import loop
from distill.training.config import OptimizerConfig
from distill.training.optimizer import make_optimizer
from distill.training.step import StepConfig, TrainState, canonical_names, make_step
from distill.tree import Params
from distill.types import Batch
from tools.workers.serve import forget_peak, peak, resident, serve

_STEPS = 10**6


def main() -> None:
  """Runs the worker: times a round of steps for each line on stdin."""
  serve(_prepare)


class Steps:
  """A training run on random rows: half forward KL and half cross-entropy, with AdamW.

  Args:
    student: The student.
    params: The student's stacked parameters, on `mesh`.
    teacher: The teacher, with parameters on `mesh`.
    mesh: The devices.
    settings: "batch" (rows), "length" (tokens of a row), "vocab", "learning_rate" and "dtype" (of the operands).

  Attributes:
    losses: Loss of each step done.
  """

  def __init__(
    self, student: Decoder, *, params: Params, teacher: LiveTeacher, mesh: Mesh, settings: Mapping[str, Any]
  ):
    self._teacher = teacher
    trained = {f"student.{name}": x for name, x in params.items()}
    terms = (ForwardKl(weight=0.5), CrossEntropy(weight=0.5))
    optimizer = make_optimizer(
      OptimizerConfig(learning_rate=settings["learning_rate"], clip_norm=0.0),
      factors=dict.fromkeys(trained, 1.0),
      names=canonical_names(student, trained),
      key="optimizer",
      steps=_STEPS,
    )
    zero = jax.device_put(jnp.asarray(0, jnp.int32), replicated(mesh))
    moments = jax.device_put(jax.jit(optimizer.init)(trained), replicated(mesh))
    self._state = TrainState(trained=trained, frozen={}, optimizer=moments, step=zero, terms={})
    self._step = make_step(
      student,
      teacher=self._teacher,
      optimizer=optimizer,
      mesh=mesh,
      state_shardings=jax.tree.map(lambda x: x.sharding, self._state),
      config=StepConfig(terms=terms, steps=_STEPS, dtype=jnp.dtype(settings["dtype"])),
    )
    self._mesh, self._batches = mesh, _batches(settings)
    self._done, self.losses = 0, list[float]()

  def batch(self, step: int, params: Params) -> Batch:
    """Returns the next random rows; this object is also the loop's batch source."""
    del step, params
    return next(self._batches)

  def advance(self, steps: int) -> None:
    """Runs `steps` steps in the library's training loop."""
    hooks = loop.Hooks(
      log=lambda at, values: self.losses.append(values["loss"]),
      save=lambda state, at: None,
      save_after=lambda at: False,
      stop=bool,
    )
    self._state, self._done = loop.run(
      self._state,
      step=self._step,
      teacher_params=self._teacher.params,
      source=self,
      mesh=self._mesh,
      start=self._done,
      steps=self._done + steps,
      hooks=hooks,
    )
    jax.block_until_ready(self._state)

  def jaxpr(self) -> Any:
    """Returns the jaxpr of one training step."""
    batch = to_global_batch(next(self._batches), mesh=self._mesh)
    return jax.make_jaxpr(self._step)(self._state, self._teacher.params, batch).jaxpr


def from_checkpoints(settings: Mapping[str, Any]) -> Steps:
  """Loads the models `student` and `teacher` in settings["directory"], and returns a training run of them."""
  mesh, directory = make_mesh(), pathlib.Path(settings["directory"])
  (student, params), (decoder, theirs) = (_model(directory / name, mesh) for name in ("student", "teacher"))
  teacher = LiveTeacher(decoder=decoder, params=theirs)
  return Steps(student, params=params, teacher=teacher, mesh=mesh, settings=settings)


def _prepare(settings: Mapping[str, Any]) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
  jax.block_until_ready(jnp.zeros(8))
  before = resident()
  steps = from_checkpoints(settings)
  steps.advance(1)

  def run() -> dict[str, Any]:
    forget_peak()
    start = time.perf_counter()
    steps.advance(settings["steps"])
    return {"seconds": time.perf_counter() - start, "bytes": peak() - before}

  return {"loss": steps.losses[0]}, run


def _model(directory: pathlib.Path, mesh) -> tuple[Decoder, dict[str, Any]]:
  config, params = hf.load(directory)
  decoder = Decoder(config)
  return decoder, jax.device_put(decoder.stack(params), replicated(mesh))


def _batches(settings: Mapping[str, Any]) -> Iterator[Batch]:
  random = np.random.default_rng(0)
  shape = settings["batch"], settings["length"]
  positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
  while True:
    yield Batch(
      tokens=random.integers(0, settings["vocab"], shape).astype(np.int32),
      segments=np.ones(shape, np.int32),
      positions=positions,
      loss_mask=np.ones(shape, np.float32),
    )


if __name__ == "__main__":
  main()
