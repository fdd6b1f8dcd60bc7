"""The plan job: compiles a recipe's step for described devices, and estimates memory and time."""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distill.errors import InputError
from distill.jobs import stage_state
from distill.jobs.abstract import abstract_batch, abstract_models
from distill.jobs.config import RunConfig, resolve
from distill.jobs.layout import check_divides
from distill.jobs.prepare import Run, check_shapes
from distill.jobs.stages import Stage, read_stages
from distill.jobs.train import make_steps
from distill.models.decoder import Decoder
from distill.objectives.objective import needs_student, needs_teacher
from distill.parallel.mesh import make_mesh
from distill.planning.chips import CHIPS, Chip
from distill.planning.estimate import Estimate, estimate
from distill.planning.model_flops import forward_flops
from distill.planning.topology import Topology, describe
from distill.teachers.live import LiveTeacher
from distill.training.memory import compile_within
from distill.training.step import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """One stage of a run on one topology.

  Attributes:
    stage: Name of the stage.
    topology: The devices.
    mesh: Size of each mesh axis that is not 1.
    remat: Remat policy that was compiled.
    steps: Optimizer steps of the stage.
    tokens: Tokens of one batch.
    memory: Bytes on one device by kind; `peak` is what the compiled step takes at most, and inf where the compiler gave
      up without saying how much it needs.
    fits: True if the peak fits the chip's memory.
    model_flops: FLOPs of the models of one step on one device: what an MFU counts.
    estimate: Time and work of one step; None if it does not fit.
    compile_seconds: Time that tracing and compiling took here.
  """

  stage: str
  topology: str
  mesh: Mapping[str, int]
  remat: str
  steps: int
  tokens: int
  memory: Mapping[str, float]
  fits: bool
  model_flops: float
  chip: Chip
  devices: int
  estimate: Estimate | None
  compile_seconds: float

  def mfu(self, seconds: float) -> float:
    """Returns the share of the chip's peak that the models' own FLOPs are, at `seconds` a step."""
    return self.model_flops / seconds / self.chip.flops

  def hours(self, seconds: float) -> float:
    """Returns the hours of the whole stage, at `seconds` a step."""
    return self.steps * seconds / 3600


def plan(recipe: Mapping[str, Any] | RunConfig, *, topologies: Sequence[str], stage: str = "") -> list[Plan]:
  """Compiles the real step of a recipe for each topology; reads no weights and needs no accelerator.

  Args:
    recipe: The configuration, as a dict, ConfigDict or RunConfig.
    topologies: Each a chip and the shape of its torus, as v5p:4x4x4, with a number of slices in front for several:
      2*v5p:8x8x8.
    stage: Name of the stage; by default all stages.

  Returns:
    A plan for each topology and stage.

  Raises:
    InputError: The configuration is wrong or cannot be planned, or a topology is unknown.
  """
  config = resolve(recipe)
  if stage and stage not in {one.name for one in config.stages}:
    raise InputError(f"--stage={stage}: the recipe has no such stage; use one of {[one.name for one in config.stages]}")
  plans = []
  for topology in map(describe, topologies):
    mesh = make_mesh(config.training.mesh, devices=topology.devices)
    check_shapes(config, mesh)
    models = abstract_models(config, mesh=mesh)
    check_divides(models.student, mesh=mesh, dtype="float32", key="config.student")
    if isinstance(models.teacher, LiveTeacher):
      check_divides(models.teacher.decoder, mesh=mesh, dtype=config.teacher.dtype, key="config.teacher")
    stages = read_stages(config.stages, models)
    run = Run(config=config, mesh=mesh, models=models, stages=stages, batches={}, resumes=False)
    plans += [_plan_stage(run, one, topology=topology) for one in stages if stage in ("", one.name)]
  return plans


def _plan_stage(run: Run, stage: Stage, *, topology: Topology) -> Plan:
  """Compiles a stage's step with the first remat policy that fits."""
  started = time.monotonic()
  params = run.models.params | jax.eval_shape(lambda: stage.term_params(run.config.seed))
  state, optimizer = stage_state.abstract_state(run, stage, params)
  teacher = run.models.teacher.params if run.models.teacher and needs_teacher(stage.terms) else {}
  batch = abstract_batch(run, stage)
  device = CHIPS[topology.chip]
  steps: Mapping[str, Any] = make_steps(run, stage, state, optimizer)
  for remat in steps:
    traced = steps[remat].trace(state, teacher, batch)
    compiled, peak = compile_within(traced.lower(lowering_platforms=(topology.platform,)))
    fits = compiled is not None and peak <= device.memory
    if fits:
      break
  rows, length = run.config.stage_shape(stage.config)
  return Plan(
    stage=stage.name,
    topology=topology.name,
    mesh={name: size for name, size in run.mesh.shape.items() if size > 1},
    remat=remat,
    steps=stage.steps,
    tokens=rows * length,
    memory=_memory(state, teacher) | {"peak": peak},
    fits=fits,
    model_flops=_model_flops(run, stage) * rows * length / run.mesh.size,
    chip=device,
    devices=run.mesh.size,
    estimate=estimate(compiled.as_text(), chip=device, mesh=run.mesh) if fits else None,
    compile_seconds=time.monotonic() - started,
  )


def _model_flops(run: Run, stage: Stage) -> float:
  """Returns the FLOPs of one token of a step: three forward passes of the student's, and the teacher's one."""
  _, length = run.config.stage_shape(stage.config)
  flops = 3 * forward_flops(run.models.student, length=length) if needs_student(stage.terms) else 0.0
  if needs_teacher(stage.terms) and run.models.teacher is not None and run.models.teacher.config is not None:
    flops += forward_flops(Decoder(run.models.teacher.config), length=length)
  return flops


def _memory(state: TrainState, teacher: Mapping[str, Any]) -> dict[str, float]:
  """Returns the bytes of the step's arguments on one device by kind."""

  def size(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(jnp.dtype(x.dtype).itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in leaves)

  return {"student": size(state.params), "optimizer": size(state.optimizer), "teacher": size(teacher)}
