"""The stages of a run: their steps, bound terms, and the terms' own parameters."""

import dataclasses
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from distill.errors import InputError
from distill.jobs.models import Models
from distill.objectives.objective import init_params, needs_teacher
from distill.objectives.term import Setting, Term
from distill.objectives.terms import bind_terms, read_terms
from distill.parallel.mesh import replicated
from distill.training.config import StageConfig
from distill.training.step import TERM_PARAMS
from distill.tree import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """One stage of a run, checked against its models.

  Attributes:
    name: Name of the stage.
    first: Number of the run's steps before the stage.
    steps: Length in optimizer steps.
    terms: Terms of the loss, bound to `setting`.
    setting: Description of the stage and both models, against which the terms were checked.
    config: Configuration of the stage from the recipe.
  """

  name: str
  first: int
  steps: int
  terms: tuple[Term, ...]
  setting: Setting
  config: StageConfig

  def term_params(self, seed: int) -> Params:
    """Returns initial values of the parameters that the terms own, such as projectors; jax can trace the method."""
    # One key for all stages: a projector that two of them train is the same, whichever comes first.
    key = jax.random.fold_in(jax.random.key(seed), 2)
    return {f"{TERM_PARAMS}.{name}": value for name, value in init_params(self.terms, self.setting, key=key).items()}


def read_stages(configs: Sequence[StageConfig], models: Models) -> tuple[Stage, ...]:
  """Returns the stages of a run in order, with their terms checked against the models.

  Raises:
    InputError: A term is wrong, or does not fit these models.
  """
  stages: list[Stage] = []
  teacher = models.teacher
  for config in configs:
    key = f"config.stages.{config.name}.terms"
    terms = read_terms(config.terms, key=key)
    if needs_teacher(terms) and teacher is None:
      raise InputError(
        f"{key}: a term needs a teacher, but there is none; set config.teacher.model or config.teacher.cache"
      )
    setting = Setting(steps=config.steps, student=models.student.config, layers_from=models.layers_from)
    if teacher is not None:
      setting = dataclasses.replace(
        setting, teacher=teacher.config, teacher_depth=teacher.depth, teacher_width=teacher.width
      )
    stages.append(
      Stage(
        name=config.name,
        first=stages[-1].first + stages[-1].steps if stages else 0,
        steps=config.steps,
        terms=bind_terms(terms, setting, key=key),
        setting=setting,
        config=config,
      )
    )
  return tuple(stages)


def term_params(stages: Sequence[Stage], *, seed: int, mesh: Mesh) -> Params:
  """Returns the initial values of all stages' term parameters, replicated on every device of `mesh`."""
  found = {name: value for stage in stages for name, value in stage.term_params(seed).items()}
  return {name: jax.device_put(value, replicated(mesh)) for name, value in found.items()}
