"""A whole run: from a configuration to trained weights on disk."""

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from distill.adapters import lora
from distill.adapters.peft import write_adapter
from distill.checkpoints import hf, hf_config
from distill.data.batches import Batches
from distill.data.tokenizer import load_tokenizer
from distill.errors import InputError
from distill.files.json_file import read_json
from distill.files.replace import replace_file
from distill.jobs import cache, data
from distill.jobs.config import RunConfig, difference, fingerprint, resolve
from distill.jobs.models import Models, build
from distill.jobs.stages import Stage, projectors, read_stages
from distill.models.remat import REMAT_POLICIES
from distill.objectives.objective import TermStates, initial_states
from distill.objectives.terms import demands, end_to_end, needs_teacher
from distill.parallel.interruption import EXIT_INTERRUPTED, Interruption
from distill.parallel.mesh import make_mesh, replicated, to_global_batch
from distill.training import loop
from distill.training.checkpoint import Checkpoints, flatten_state, unflatten_state
from distill.training.memory import first_that_fits
from distill.training.metrics import MetricsWriter, Progress
from distill.training.optimizer import make_optimizer, multipliers, state_shardings
from distill.training.step import StepConfig, TrainState, branch, canonical_names, make_step
from distill.tree import Params


def train(recipe: Mapping[str, Any] | RunConfig, *, workdir: pathlib.Path) -> int:
  """Runs, or goes on with, the training that `recipe` describes; the same call resumes where it stopped.

  Writes `config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`, and at the end `student/` (an HF directory) or,
  when adapters were trained, `adapter/` (a PEFT directory).

  Returns:
    0, or `EXIT_INTERRUPTED` after a signal.

  Raises:
    InputError: The configuration, a file it names, or the workdir is wrong.
  """
  config = resolve(recipe)
  runner, params = prepared(config, workdir=workdir)
  checkpoints = Checkpoints(workdir / "checkpoints")
  try:
    with Interruption() as interruption:
      params, finished = runner.run(params, checkpoints=checkpoints, interruption=interruption)
  finally:
    checkpoints.close()
  if not finished:
    return EXIT_INTERRUPTED
  _write_result(workdir, config, runner.models, params)
  return 0


def prepared(config: RunConfig, *, workdir: pathlib.Path) -> tuple["Runner", Params]:
  """A run, its data read and its models in memory, and its parameters before the first step.

  Raises:
    InputError: The configuration, a file it names, or the workdir is wrong.
  """
  mesh = make_mesh(config.training.mesh)
  shapes = [config.stage_shape(stage) for stage in config.stages]
  if any(rows // config.training.micro_batches % (mesh.size // mesh.shape["tensor"]) for rows, _ in shapes):
    raise InputError("config.training.batch_size: a micro-batch must divide among the data and fsdp devices")
  _claim(workdir, config)
  tokenizer, batches = data.read(config, workdir=workdir)
  found = cache.CacheIndex(config, batches=batches) if config.teacher.cache else None
  cached = found.teacher if found else None
  resumes = any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))
  models = build(config, mesh=mesh, batches=next(iter(batches.values())), cached=cached, resumes=resumes)
  vocab = models.student.config.vocab_size
  if len(tokenizer) > vocab:
    raise InputError(
      f"config.tokenizer: {len(tokenizer)} tokens, the student's vocabulary has {vocab}; name the teacher's tokenizer"
    )
  for architecture in (models.student.config, models.teacher.config if models.teacher else None):
    if architecture is not None:
      architecture.check_length(max(length for _, length in shapes), what="config.data.length")
  stages = read_stages(config.stages, models)
  if found:
    batches = {
      stage.name: found.batches(stage.name, terms=stage.config.terms, wanted=demands(stage.terms)) for stage in stages
    }
  params = {**models.params, **projectors(stages, models=models, seed=config.seed, mesh=mesh)}
  student = models.student.config
  print(f"student: {student.family}; {hf_config.who_loads(student)}", file=sys.stderr, flush=True)
  runner = Runner(
    config=config, workdir=workdir, mesh=mesh, models=models, batches=batches, stages=stages, resumes=resumes
  )
  return runner, params


def _claim(workdir: pathlib.Path, config: RunConfig) -> None:
  """Marks the directory as this run's, or refuses one of another that has got anywhere."""
  path, identity = workdir / "config.json", fingerprint(config)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if path.exists():
      earlier = read_json(path)
      if earlier.get("fingerprint") == identity:
        return
      if any((workdir / "checkpoints").glob("[0-9]*")) or "fingerprint" not in earlier:
        key = difference(earlier.get("config", {}), config) or "config"
        raise InputError(f"{path}: of a run with another {key}; use another --workdir, or delete this one")
    with replace_file(path) as work:
      work.write_text(
        json.dumps({"fingerprint": identity, "config": dataclasses.asdict(config)}, indent=1, default=str) + "\n"
      )
  except OSError as error:
    raise InputError(f"{workdir}: cannot be written ({error.strerror}); name another --workdir") from error


def _carried(stage: Stage, optimizer) -> Callable[[Params], tuple[Any, TermStates]]:
  """From trained parameters to what a stage carries from step to step: the optimizer's state and its terms'."""
  return lambda trained: (optimizer.init(trained), initial_states(stage.terms))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runner:
  """The stages of one run, one after another, from wherever the last checkpoint stands."""

  config: RunConfig
  workdir: pathlib.Path
  mesh: Mesh
  models: Models
  batches: Mapping[str, Batches]
  stages: tuple[Stage, ...]
  resumes: bool

  def run(self, params: Params, *, checkpoints: Checkpoints, interruption: Interruption) -> tuple[Params, bool]:
    """All parameters after the last stage, and whether it was reached."""
    shardings = self._shardings(params)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name]) for name, x in params.items()}
    restored = checkpoints.restore(lambda extra: self._abstract(shapes, extra))
    done, flat = 0, None
    if restored is None and self.resumes:
      raise InputError(f"{checkpoints.directory}: its checkpoints are gone; run the command again")
    if restored is not None:
      arrays, extra = restored
      if extra.get("cache", "") != self._cache:
        raise InputError(f"{self.workdir}: learns from another config.teacher.cache; name it, or another --workdir")
      params, flat, done = branch(arrays, "params"), branch(arrays, "optimizer"), extra["step"]
    writer = MetricsWriter(self.workdir, step=done)
    try:
      for stage in self.stages:
        if done >= stage.first + stage.steps:
          continue
        state, optimizer = self.state(stage, params, done=done - stage.first, flat=flat)
        flat = None
        state, at = self._stage(stage, state, optimizer, checkpoints, interruption, writer)
        params, done = state.params, stage.first + at
        if at < stage.steps:
          return params, False
    finally:
      writer.close()
    return params, True

  @property
  def _cache(self) -> str:
    """Which cache the run learns from, if any."""
    return self.models.teacher.identity if self.models.teacher else ""

  def _shardings(self, params: Params) -> Params:
    student = {f"student.{name}": x for name, x in self.models.student.shardings(self.mesh).items()}
    factors = lora.shardings(self.models.student, branch(params, "adapters"), mesh=self.mesh)
    adapters = {f"adapters.{name}": x for name, x in factors.items()}
    return {name: replicated(self.mesh) for name in params} | student | adapters

  def _optimizer(self, stage: Stage, params: Params):
    """(factor of every parameter the stage trains, its optimizer)."""
    key = f"config.stages.{stage.name}"
    names = canonical_names(self.models.student, params)
    factors = multipliers(stage.config.train, names=names, what=f"{key}.train")
    used = {f"projectors.{i}_{j}.kernel" for i, j in end_to_end(stage.terms)}
    trained = {
      name: factor
      for name, factor in factors.items()
      if np.any(factor) and (not name.startswith("projectors.") or name in used)
    }
    if not trained:
      raise InputError(f"{key}.train: nothing trains; give a regex that matches a parameter")
    names = {name: names[name] for name in trained}
    return trained, make_optimizer(
      stage.config.optimizer, trained=trained, names=names, key=f"{key}.optimizer", steps=stage.steps
    )

  def _abstract(self, shapes: Params, extra: Mapping[str, Any]) -> Params:
    """What a checkpoint with these notes holds."""
    stage = next(one for one in self.stages if one.name == extra["stage"])
    trained, optimizer = self._optimizer(stage, shapes)
    carried = _carried(stage, optimizer)
    state = jax.eval_shape(carried, {name: shapes[name] for name in trained})
    places = flatten_state(state_shardings(state, params=shapes, mesh=self.mesh))
    flat = {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[name]) for name, x in flatten_state(state).items()
    }
    params = {f"params.{name}": x for name, x in shapes.items()}
    return params | {f"optimizer.{name}": x for name, x in flat.items()}

  def state(self, stage: Stage, params: Params, *, done: int = 0, flat: Params | None = None):
    """(what a stage's steps change, its optimizer), from so many steps on with the `flat` state of a checkpoint."""
    trained, optimizer = self._optimizer(stage, params)
    mine = {name: params[name] for name in trained}
    rest = {name: x for name, x in params.items() if name not in trained}
    carried = _carried(stage, optimizer)
    state = jax.eval_shape(carried, mine)
    if flat:
      opt, terms = unflatten_state(state, flat)
    else:
      shardings = state_shardings(state, params=params, mesh=self.mesh)
      opt, terms = jax.jit(carried, out_shardings=shardings)(mine)
    step = jax.device_put(jnp.asarray(done, jnp.int32), replicated(self.mesh))
    return TrainState(trained=mine, frozen=rest, optimizer=opt, step=step, terms=terms), optimizer

  def teacher_params(self, stage: Stage) -> Mapping[str, Any]:
    """What the step of a stage is given of the teacher."""
    return self.models.teacher.params if self.models.teacher and needs_teacher(stage.terms) else {}

  def step(self, stage: Stage, state: TrainState, optimizer: optax.GradientTransformation):
    """The jitted step of a stage, which keeps as much of the forward pass as there is memory for."""
    training = self.config.training
    config = StepConfig(
      terms=stage.terms,
      steps=stage.steps,
      micro_batches=training.micro_batches,
      dtype=jnp.dtype(training.dtype),
      adapter_scale=self.models.adapter_scale,
    )
    steps = [
      make_step(
        self.models.student,
        teacher=self.models.teacher,
        optimizer=optimizer,
        mesh=self.mesh,
        state_shardings=jax.tree.map(lambda x: x.sharding, state),
        config=dataclasses.replace(config, remat=remat),
      )
      for remat in REMAT_POLICIES
    ]
    return first_that_fits(steps, report=lambda text: print(f"{stage.name}: {text}", file=sys.stderr))

  def _stage(self, stage, state, optimizer, checkpoints, interruption, writer) -> tuple[TrainState, int]:
    step = self.step(stage, state, optimizer)
    done = int(state.step)
    progress = Progress(stage.name, done=done, total=stage.steps)
    clock = [time.monotonic()]

    def log(at: int, values: dict[str, float]) -> None:
      now = time.monotonic()
      speed, clock[0] = values["tokens"] / max(now - clock[0], 1e-9), now
      writer.write(stage.first + at, {"stage": stage.name, **values, "tokens_per_second": speed})
      progress.update(at, tokens=values["tokens"], note=f"loss {values['loss']:.4f}, ")
      if not np.isfinite(values["loss"]):
        raise InputError(
          f"config.stages.{stage.name}: loss is {values['loss']} at step {at}; lower the learning rate and run again"
        )

    def save(state: TrainState, at: int) -> None:
      arrays = {f"params.{name}": x for name, x in state.params.items()}
      arrays |= {f"optimizer.{name}": x for name, x in flatten_state((state.optimizer, state.terms)).items()}
      extra = {"stage": stage.name, "step": stage.first + at} | ({"cache": self._cache} if self._cache else {})
      checkpoints.save(stage.first + at, arrays=arrays, extra=extra)

    every = self.config.training.checkpoint_every
    hooks = loop.Hooks(
      log=log, save=save, save_after=lambda at: at % every == 0 or at == stage.steps, stop=interruption.requested
    )
    try:
      return loop.run(
        state,
        step=step,
        teacher_params=self.teacher_params(stage),
        batches=(to_global_batch(batch, mesh=self.mesh) for batch in self.batches[stage.name].iterate(done)),
        start=done,
        steps=stage.steps,
        hooks=hooks,
      )
    finally:
      progress.close()


def _base_name(model: str) -> str:
  """What an adapter calls its base: the directory's own name, or the hub's without the revision."""
  return pathlib.Path(model).name if pathlib.Path(model).is_dir() else model.partition("@")[0]


def _write_result(workdir: pathlib.Path, config: RunConfig, models: Models, params: Params) -> None:
  adapters = branch(params, "adapters")
  if adapters:
    write_adapter(
      workdir / "adapter",
      factors=lora.factors(models.student, adapters, scale=models.adapter_scale),
      config=models.student.config,
      base=_base_name(config.student.model),
    )
    return
  canonical = models.student.unstack(jax.device_get(branch(params, "student")))
  source = data.tokenizer_path(config)
  tokenizer = load_tokenizer(source)
  special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
  hf.save(
    workdir / "student",
    config=models.student.config,
    params=canonical,
    tokenizer_from=pathlib.Path(source),
    special=special,
  )
