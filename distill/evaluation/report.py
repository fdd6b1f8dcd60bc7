"""A comparison as rows: one for each model, for each model and skill, and for each model on held-out text."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from distill.evaluation.model import BASE, TEACHER
from distill.evaluation.retention import Interval

SCHEMA = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRow:
  """A model's size and shape.

  Attributes:
    role: As in `EvaluatedModel`.
    name: As in `EvaluatedModel`.
    family: Its model family.
    parameters: Number of its parameters.
    width: Its model width.
    layers: The kind of each layer's mixer.
  """

  role: str
  name: str
  family: str
  parameters: int
  width: int
  layers: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkillRow:
  """A model's answers to the questions of a skill.

  Attributes:
    skill: Name of the skill.
    examples: Number of its questions.
    chance: Expected accuracy of guessing.
    role: The model's role.
    name: The model's name.
    accuracy: Share of right answers.
    retention: Share of the teacher's gain over the base; None for these two, or where there is no gain.
  """

  skill: str
  examples: int
  chance: float
  role: str
  name: str
  accuracy: Interval
  retention: Interval | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FidelityRow:
  """A model on held-out text.

  Attributes:
    role: The model's role.
    name: The model's name.
    tokens: Number of predicted tokens.
    bits_per_byte: Negative log-likelihood / (ln 2 · UTF-8 bytes); the first token of each row's document is given.
    kl: KL(teacher ‖ model) at temperature 1, nats a token; None for the base and the teacher, or without a teacher.
    top1_agreement: Share of tokens for which model and teacher predict the same next token; None as for `kl`.
  """

  role: str
  name: str
  tokens: float
  bits_per_byte: float
  kl: float | None
  top1_agreement: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """A comparison of models.

  Attributes:
    date: The day it was made, in ISO format.
    models: A row for each model.
    skills: Skill after skill, a row for each model in the order of `models`.
    fidelity: A row for each model; empty without held-out text.
    curves: Step, stage and loss of the student's training, if known.
  """

  date: str
  models: tuple[ModelRow, ...]
  skills: tuple[SkillRow, ...]
  fidelity: tuple[FidelityRow, ...]
  curves: tuple[Mapping[str, Any], ...]

  def by_skill(self) -> Iterator[tuple[SkillRow, ...]]:
    """Yields the rows of one skill after another, each in the order of `models`."""
    for first in range(0, len(self.skills), len(self.models)):
      yield self.skills[first : first + len(self.models)]

  @property
  def labels(self) -> tuple[str, ...]:
    """Label of each model: its role, or its name where several have that role."""
    counts = collections.Counter(model.role for model in self.models)
    return tuple(model.role if counts[model.role] == 1 else model.name for model in self.models)

  @property
  def teacher(self) -> ModelRow | None:
    """The model that others are compared with, if there is one."""
    return next((model for model in self.models if model.role == TEACHER), None)

  @property
  def has_retention(self) -> bool:
    """True where both a base and a teacher were measured."""
    return {BASE, TEACHER} <= {model.role for model in self.models}

  def to_json(self) -> dict[str, Any]:
    """Returns the report as plain values for JSON."""
    return {"schema": SCHEMA, **dataclasses.asdict(self)}


def is_measured(row: ModelRow | SkillRow | FidelityRow) -> bool:
  """True for a model that is compared with the teacher: neither the base nor the teacher itself."""
  return row.role not in (BASE, TEACHER)
