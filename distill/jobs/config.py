"""The typed configuration of a run: combines the sections that the packages declare, and reads recipes into it."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from distill.adapters.config import AdapterConfig
from distill.configuration import option, read
from distill.data.config import DataConfig
from distill.errors import InputError
from distill.evaluation.config import EvaluationConfig
from distill.objectives.terms import read_terms
from distill.schedules import schedule
from distill.teachers.config import TeacherCacheConfig, TeacherConfig
from distill.training.config import StageConfig, TrainingConfig

# Sections that a training does not depend on.
_SEPARATE = ("teacher_cache", "evaluation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentConfig:
  """The student: an existing model to train further, or a new architecture."""

  model: str = option("", help="Model directory, or org/name[@revision] of the hub; in place of config.")
  config: Mapping[str, Any] | None = option(None, help="Keys of an HF config.json, for a new student.")
  layers_from: tuple[int, ...] | str = option(
    (), help="Teacher layer that each student layer starts from; 'importance' measures which; empty starts at random."
  )
  calibration_rows: int = option(64, help="Rows of the run's text on which importance is measured.", least=1)
  adapters: AdapterConfig = option(AdapterConfig, help="A LoRA adapter that is trained.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """The full configuration of a run, which `resolve` makes from a recipe."""

  seed: int = option(0, help="Seed of initial weights, shuffling and sampling.", least=0)
  tokenizer: str = option("", help="Directory of the tokenizer; the teacher's, else the student's, where it is empty.")
  teacher: TeacherConfig = option(TeacherConfig, help="The teacher.")
  teacher_cache: TeacherCacheConfig = option(TeacherCacheConfig, help="What `distill cache` stores.")
  student: StudentConfig = option(StudentConfig, help="The student.")
  data: DataConfig = option(help="The text.")
  training: TrainingConfig = option(TrainingConfig, help="What all stages share.")
  stages: tuple[StageConfig, ...] = option(help="Stages of the training, which run in this order.")
  evaluation: EvaluationConfig = option(EvaluationConfig, help="What `distill compare` measures.")

  def stage_shape(self, stage: StageConfig) -> tuple[int, int]:
    """Returns (rows of a batch, tokens of a row) of a stage: its own options, or the run's where these are 0."""
    return stage.batch_size or self.training.batch_size, stage.length or self.data.length


def resolve(recipe: Mapping[str, Any] | ConfigDict | RunConfig) -> RunConfig:
  """Returns a recipe as typed configuration, with every default filled in.

  Raises:
    InputError: A key is missing or unknown, a value is wrong, or two values contradict each other.
  """
  config = read(RunConfig, plain(recipe), key="config")
  if not config.stages:
    raise InputError("config.stages: empty; give at least one stage, as [{'name': …, 'steps': …, 'terms': …}]")
  layers = config.student.layers_from
  if isinstance(layers, str) and layers != "importance":
    raise InputError(
      f"config.student.layers_from: {layers!r} is not a list; give teacher layers such as (0, 3, 6), or 'importance'"
    )
  for axis, size in config.training.mesh.sizes().items():
    if size == 0:
      raise InputError(
        f"config.training.mesh.{axis}: got 0 devices; use at least 1, or -1 for all devices that are left"
      )
  for stage in config.stages:
    _check_stage(stage, micro_batches=config.training.micro_batches, rows=config.stage_shape(stage)[0])
  return config


def plain(value: Any) -> Any:
  """Converts a ConfigDict and all ConfigDicts inside it to plain dicts; other values are returned unchanged."""
  if isinstance(value, ConfigDict | Mapping):
    return {key: plain(one) for key, one in value.items()}
  return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def _check_stage(stage: StageConfig, *, micro_batches: int, rows: int) -> None:
  key = f"config.stages.{stage.name}"
  if not stage.name or "." in stage.name or stage.name.isdigit():
    raise InputError(f"config.stages: {stage.name!r} is not a valid stage name; use letters and no dots, as in 'align'")
  if stage.length == 1:
    raise InputError(
      f"{key}.length: 1 leaves no next token to predict; use at least 2, or 0 for the length in config.data.length"
    )
  if rows % micro_batches:
    raise InputError(
      f"config.training.micro_batches: {micro_batches} does not divide the {rows} rows of a batch of {key}; use a "
      f"divisor of {rows}"
    )
  schedule(stage.optimizer.learning_rate, key=f"{key}.optimizer.learning_rate", steps=stage.steps, least=0)
  # Terms are built for their models later; a misspelt one is refused here, before a model is loaded.
  read_terms(stage.terms, key=f"{key}.terms")


def fingerprint(config: RunConfig) -> str:
  """Returns a digest of all keys that affect a run's result.

  Left out are the evaluation, how `distill cache` stores a teacher, the path of the teacher cache, the architecture by
  which `distill plan` plans, the mesh, the remat policy, and how often metrics and checkpoints are written.
  """
  shaping = _shaping(config)
  shaping["teacher"]["cache"] = bool(config.teacher.cache)
  del shaping["teacher"]["config"]
  for quiet in ("checkpoint_every", "log_every", "mesh", "remat"):
    del shaping["training"][quiet]
  return hashlib.sha256(json.dumps(shaping, sort_keys=True, default=str).encode()).hexdigest()


def _shaping(config: RunConfig) -> dict[str, Any]:
  return {key: value for key, value in dataclasses.asdict(config).items() if key not in _SEPARATE}


def difference(earlier: Mapping[str, Any], now: RunConfig) -> str:
  """Returns the first key, in alphabetical order, at which two runs differ; "" if they are the same.

  Args:
    earlier: Configuration of the earlier run, read from its config.json.
    now: Configuration of this run.
  """
  shaping = [{key: value for key, value in earlier.items() if key not in _SEPARATE}, _shaping(now)]
  return _difference(*(json.loads(json.dumps(one, default=str)) for one in shaping), key="config")


def _difference(earlier: Any, now: Any, *, key: str) -> str:
  if isinstance(earlier, dict) and isinstance(now, dict):
    pairs = [(f"{key}.{name}", earlier.get(name), now.get(name)) for name in sorted({*earlier, *now})]
  elif isinstance(earlier, list) and isinstance(now, list) and len(earlier) == len(now):
    pairs = [(f"{key}[{i}]", *pair) for i, pair in enumerate(zip(earlier, now, strict=True))]
  else:
    return "" if earlier == now else key
  return next((found for name, *pair in pairs if (found := _difference(*pair, key=name))), "")
