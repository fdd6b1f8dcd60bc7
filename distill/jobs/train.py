"""The train job: runs a recipe and writes the trained weights."""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill.adapters import lora
from distill.adapters.peft_writer import write_adapter
from distill.checkpoints import hf
from distill.data.tokenizer import load_tokenizer
from distill.errors import InputError
from distill.jobs import data, stage_state
from distill.jobs.config import RunConfig, resolve
from distill.jobs.prepare import Run, prepare
from distill.jobs.run_directory import RunDirectory
from distill.jobs.stages import Stage
from distill.models.remat import REMAT_POLICIES
from distill.objectives.objective import needs_teacher
from distill.parallel.interruption import EXIT_INTERRUPTED, Interruption
from distill.training import loop
from distill.training.checkpoint import Checkpoints
from distill.training.loop import BatchSource
from distill.training.memory import first_that_fits
from distill.training.metrics import MetricsWriter, Progress
from distill.training.step import StepConfig, TrainState, branch, make_step
from distill.tree import Params


def train(
  recipe: Mapping[str, Any] | RunConfig,
  *,
  workdir: str | pathlib.Path,
  batches: Mapping[str, BatchSource] | None = None,
) -> int:
  """Runs the training that a recipe describes; the same call continues it where it stopped.

  Args:
    recipe: The configuration, as a dict, ConfigDict or RunConfig.
    workdir: Directory of the run; `RunDirectory` lists the files written there.
    batches: Batch source of each stage, by name, in place of the recipe's text.

  Returns:
    The exit code: 0, or `EXIT_INTERRUPTED` if SIGTERM or SIGINT stopped the run.

  Raises:
    InputError: The configuration, a file it names, or the workdir is wrong.
  """
  config, directory = resolve(recipe), RunDirectory(pathlib.Path(workdir))
  directory.claim(config)
  run, params = prepare(config, directory=directory, batches=batches)
  checkpoints = directory.checkpoints()
  try:
    with Interruption() as interruption:
      params, finished = _train_stages(
        run, params, directory=directory, checkpoints=checkpoints, stop=interruption.requested
      )
  finally:
    checkpoints.close()
  if not finished:
    return EXIT_INTERRUPTED
  _write_result(run, params, directory=directory)
  return 0


def _train_stages(
  run: Run, params: Params, *, directory: RunDirectory, checkpoints: Checkpoints, stop: Callable[[], bool]
) -> tuple[Params, bool]:
  """Trains the stages in order; returns (all parameters, True if the last stage was finished)."""
  params, saved_states, run_done = _restore(run, params, checkpoints=checkpoints)
  metrics = directory.metrics_writer(step=run_done)
  try:
    for stage in run.stages:
      stage_done = run_done - stage.first
      if stage_done >= stage.steps:
        continue
      # A checkpoint from the end of a stage holds the optimizer state of that stage, which the next one does not use.
      state, optimizer = stage_state.begin(
        run, stage, params, done=stage_done, saved_states=saved_states if stage_done else None
      )
      reporter = _StageReporter(run, stage, start=stage_done, metrics=metrics, checkpoints=checkpoints)
      step = compile_step(run, stage, state, optimizer)
      state, stage_done = _train_stage(run, stage, state, step=step, reporter=reporter, stop=stop)
      params, saved_states, run_done = state.params, None, stage.first + stage_done
      if stage_done < stage.steps:
        return params, False
  finally:
    metrics.close()
  return params, True


def _restore(run: Run, params: Params, *, checkpoints: Checkpoints) -> tuple[Params, Params | None, int]:
  """Returns (parameters, optimizer and term states, steps done) of the newest checkpoint, or (`params`, None, 0)."""
  restored = checkpoints.restore(lambda extra: stage_state.array_shapes(run, params, stage=extra["stage"]))
  if restored is None:
    if run.resumes:
      raise InputError(
        f"{checkpoints.directory}: the checkpoints were deleted after this command started; run it again to train from "
        "the first step"
      )
    return params, None, 0
  arrays, extra = restored
  if extra.get("cache", "") != _cache_identity(run):
    raise InputError(
      f"{checkpoints.directory}: the run has learnt from another teacher cache until now; set config.teacher.cache to "
      "that one, or use another --workdir"
    )
  return *stage_state.from_arrays(arrays), extra["step"]


def _cache_identity(run: Run) -> str:
  """Returns the digest of the run's teacher cache; an empty string if the teacher is live or there is none."""
  return run.models.teacher.identity if run.models.teacher else ""


def compile_step(run: Run, stage: Stage, state: TrainState, optimizer: optax.GradientTransformation) -> loop.Step:
  """Returns the jitted step of a stage, with the remat policy that saves most and still fits the memory."""
  steps = list(make_steps(run, stage, state, optimizer).values())
  return first_that_fits(steps, report=lambda text: print(f"{stage.name}: {text}", file=sys.stderr))


def make_steps(
  run: Run, stage: Stage, state: TrainState, optimizer: optax.GradientTransformation
) -> dict[str, Callable[..., Any]]:
  """Returns the jitted step of a stage for each remat policy that the configuration allows, by name.

  Args:
    run: The run.
    stage: The stage.
    state: The stage's training state, or its shapes with shardings.
    optimizer: The stage's optimizer.
  """
  training = run.config.training
  config = StepConfig(
    terms=stage.terms,
    steps=stage.steps,
    micro_batches=training.micro_batches,
    dtype=jnp.dtype(training.dtype),
    adapter_scale=run.models.adapter_scale,
  )
  return {
    policy: make_step(
      run.models.student,
      teacher=run.models.teacher,
      optimizer=optimizer,
      mesh=run.mesh,
      state_shardings=jax.tree.map(lambda x: x.sharding, state),
      config=dataclasses.replace(config, remat=policy),
    )
    for policy in REMAT_POLICIES
    if training.remat in ("auto", policy)
  }


def teacher_params(run: Run, stage: Stage) -> Mapping[str, Any]:
  """Returns the teacher's parameters for the step of a stage; an empty mapping if no term needs a teacher."""
  return run.models.teacher.params if run.models.teacher and needs_teacher(stage.terms) else {}


def _train_stage(
  run: Run, stage: Stage, state: TrainState, *, step: loop.Step, reporter: "_StageReporter", stop: Callable[[], bool]
) -> tuple[TrainState, int]:
  """Trains a stage to its end, or until asked to stop; returns its state and how many of its steps are done."""
  every = run.config.training.checkpoint_every
  hooks = loop.Hooks(
    log=reporter.log,
    save=reporter.save,
    save_after=lambda done: done % every == 0 or done == stage.steps,
    stop=stop,
  )
  try:
    return loop.run(
      state,
      step=step,
      teacher_params=teacher_params(run, stage),
      source=run.batches[stage.name],
      mesh=run.mesh,
      start=int(state.step),
      steps=stage.steps,
      hooks=hooks,
    )
  finally:
    reporter.close()


class _StageReporter:
  """Writes a stage's metrics and checkpoints, and shows its progress."""

  def __init__(self, run: Run, stage: Stage, *, start: int, metrics: MetricsWriter, checkpoints: Checkpoints):
    self._run, self._stage, self._metrics, self._checkpoints = run, stage, metrics, checkpoints
    self._progress = Progress(stage.name, done=start, total=stage.steps)
    self._time, self._tokens = time.monotonic(), 0.0
    self.close = self._progress.close

  def log(self, done: int, values: dict[str, float]) -> None:
    """Shows the progress and the loss of step `done`, and writes the step's metrics to metrics.jsonl if it is due.

    A line is due every `log_every` steps, at the stage's last step, and if the loss is not finite. Its `tokens` counts
    all tokens since the previous line.

    Raises:
      InputError: The loss is not finite.
    """
    self._tokens += values["tokens"]
    finite = np.isfinite(values["loss"])
    if done % self._run.config.training.log_every == 0 or done == self._stage.steps or not finite:
      now = time.monotonic()
      speed = self._tokens / max(now - self._time, 1e-9)
      line: dict[str, float | str] = {
        "stage": self._stage.name,
        **values,
        "tokens": self._tokens,
        "tokens_per_second": speed,
      }
      self._metrics.write(self._stage.first + done, line)
      self._time, self._tokens = now, 0.0
    self._progress.update(done, tokens=values["tokens"], note=f"loss {values['loss']:.4f}, ")
    if not finite:
      raise InputError(
        f"config.stages.{self._stage.name}: loss is {values['loss']} at step {done}; lower the learning rate and run "
        "again"
      )

  def save(self, state: TrainState, done: int) -> None:
    """Saves a checkpoint of the run after `done` steps of the stage."""
    cache = _cache_identity(self._run)
    extra = {"stage": self._stage.name, "step": self._stage.first + done} | ({"cache": cache} if cache else {})
    self._checkpoints.save(self._stage.first + done, arrays=stage_state.to_arrays(state), extra=extra)


def _write_result(run: Run, params: Params, *, directory: RunDirectory) -> None:
  """Writes the trained adapter if the run trains one, else the student."""
  student = run.models.student
  if adapters := branch(params, "adapters"):
    write_adapter(
      directory.adapter,
      factors=lora.factors(student, adapters, scale=run.models.adapter_scale),
      config=student.config,
      base=_base_name(run.config.student.model),
    )
    return
  tokenizer_directory = data.tokenizer_path(run.config)
  tokenizer = load_tokenizer(tokenizer_directory)
  hf.save(
    directory.student,
    config=student.config,
    params=student.unstack(jax.device_get(branch(params, "student"))),
    tokenizer_from=pathlib.Path(tokenizer_directory),
    special={key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
  )


def _base_name(model: str) -> str:
  """Returns the base model's name for an adapter's config: the directory, or the hub name without the revision."""
  return pathlib.Path(model).name if pathlib.Path(model).is_dir() else model.partition("@")[0]
