"""Prepares a run before its first step: reads its text, loads its models and builds its stages."""

import dataclasses
import sys
from collections.abc import Mapping

from jax.sharding import Mesh

from distill.checkpoints import hf_config
from distill.data.batches import Batches
from distill.errors import InputError
from distill.jobs import data
from distill.jobs.cache import cached_batches, open_index
from distill.jobs.config import RunConfig
from distill.jobs.models import Models, build_models
from distill.jobs.run_directory import RunDirectory
from distill.jobs.stages import Stage, read_stages, term_params
from distill.parallel.mesh import batch_shards, make_mesh
from distill.teachers.cache_index import CacheIndex
from distill.training.loop import BatchSource
from distill.tree import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """A training run whose text is read and whose models are in memory.

  Attributes:
    config: Configuration of the run.
    mesh: The devices.
    models: Teacher and student.
    stages: Stages of the run, in order.
    batches: Batch source of each stage, by name.
    resumes: True if the run's directory had checkpoints when the run was prepared; training continues from the newest.
  """

  config: RunConfig
  mesh: Mesh
  models: Models
  stages: tuple[Stage, ...]
  batches: Mapping[str, BatchSource]
  resumes: bool


def prepare(
  config: RunConfig, *, directory: RunDirectory, batches: Mapping[str, BatchSource] | None = None
) -> tuple[Run, Params]:
  """Reads the text, loads the models and builds the stages of a run.

  Args:
    config: The configuration.
    directory: The run's directory, after a call of its method `claim`.
    batches: Batch source of each stage, by name, in place of the configuration's text.

  Returns:
    The run, and its parameters before the first step.

  Raises:
    InputError: The configuration or a file it names is wrong.
  """
  mesh = make_mesh(config.training.mesh)
  check_shapes(config, mesh)
  tokenizer = data.read_tokenizer(config)
  text = None
  if batches is None:
    text = data.read_batches(config, tokenizer=tokenizer, tokens=directory.tokens, mesh=mesh)
  cache, resumes = _cache_index(config, text), bool(directory.steps())
  models = build_models(
    config,
    mesh=mesh,
    batches=next(iter(text.values())) if text else None,
    cached=cache.teacher if cache else None,
    resumes=resumes,
  )
  _check_vocabulary(models, tokens=len(tokenizer))
  _check_lengths(config, models)
  stages = read_stages(config.stages, models)
  if cache:
    assert text is not None
    text = {stage.name: cached_batches(cache, text[stage.name], stage=stage) for stage in stages}
  params = {**models.params, **term_params(stages, seed=config.seed, mesh=mesh)}
  student = models.student.config
  print(f"student: {student.family}; {hf_config.who_loads(student)}", file=sys.stderr, flush=True)
  sources: Mapping[str, BatchSource] = text if batches is None else batches  # type: ignore[assignment]
  if missing := [stage.name for stage in stages if stage.name not in sources]:
    raise InputError(f"batches: there is no batch source for stage {missing[0]!r}; give one for every stage")
  run = Run(config=config, mesh=mesh, models=models, stages=stages, batches=sources, resumes=resumes)
  return run, params


def check_shapes(config: RunConfig, mesh: Mesh) -> None:
  """Checks that the rows of every micro-batch divide evenly among the devices.

  Raises:
    InputError: The rows of a micro-batch do not.
  """
  row_devices = batch_shards(mesh)
  for stage in config.stages:
    rows = config.stage_shape(stage)[0] // config.training.micro_batches
    if rows % row_devices:
      raise InputError(
        f"config.training.batch_size: {rows} rows of a micro-batch in stage {stage.name!r} do not divide evenly among "
        f"the {row_devices} parts of the mesh that hold rows (its axes but tensor); change batch_size, micro_batches "
        "or mesh"
      )


def _cache_index(config: RunConfig, text: Mapping[str, Batches] | None) -> CacheIndex | None:
  if not config.teacher.cache:
    return None
  if text is None:
    raise InputError(
      "config.teacher.cache: the cache has the teacher's outputs for the rows of config.data.sources alone, but this "
      "run takes its batches from elsewhere; set config.teacher.model in place of the cache"
    )
  return open_index(config, text)


def _check_vocabulary(models: Models, *, tokens: int) -> None:
  """Checks that the student's vocabulary holds all `tokens` tokens of the tokenizer.

  Raises:
    InputError: The vocabulary is smaller.
  """
  vocab = models.student.config.vocab_size
  if tokens > vocab:
    raise InputError(
      f"config.tokenizer: has {tokens} tokens, but the student's vocabulary has {vocab}; use a tokenizer with at most "
      "as many, such as the teacher's"
    )


def _check_lengths(config: RunConfig, models: Models) -> None:
  """Checks that the longest rows fit the learned positions of student and teacher, where these have any.

  Raises:
    InputError: A row has more tokens than a model has learned positions.
  """
  length = max(config.stage_shape(stage)[1] for stage in config.stages)
  for architecture in (models.student.config, models.teacher.config if models.teacher else None):
    if architecture is not None:
      architecture.check_length(length, what="config.data.length")
