"""The result of a comparison as rows: models, their accuracies in each skill, and their fidelity on held-out text."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from distill.evaluation.model import BASE, TEACHER
from distill.evaluation.retention import Interval

SCHEMA = 2
# Label of the model with the role `TEACHER`: the base with its whole stack of adapters.
STACK = "stack"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRow:
  """A model's size and shape.

  Attributes:
    role: Part of the model in the comparison, as in `EvaluatedModel`.
    name: Name of the model in the report.
    family: Name of the model family.
    parameters: Number of parameters.
    width: Model width D.
    layers: Kind of each layer's mixer, from the first layer on.
  """

  role: str
  name: str
  family: str
  parameters: int
  width: int
  layers: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkillRow:
  """A model's accuracy and retention in one skill.

  Attributes:
    skill: Name of the skill.
    examples: Number of the skill's questions.
    chance: Expected accuracy of guessing.
    role: The model's role.
    name: The model's name.
    accuracy: Share of right answers.
    retention: Share of the teacher's gain over the base that the model has. None for teacher and base, if one of them
      was not measured, or if the teacher gains nothing.
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
  """A model's bits per byte and closeness to the teacher on held-out text.

  Attributes:
    role: The model's role.
    name: The model's name.
    tokens: Number of predicted tokens.
    bits_per_byte: Negative log-likelihood / (ln 2 · UTF-8 bytes); no document's first token is predicted.
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
    date: Day of the comparison, in ISO format.
    models: A row for each model.
    skills: For each skill in turn, a row for each model in the order of `models`.
    fidelity: A row for each model; empty without held-out text.
    curves: Step, stage and loss of each logged line of the student's training; empty if unknown.
  """

  date: str
  models: tuple[ModelRow, ...]
  skills: tuple[SkillRow, ...]
  fidelity: tuple[FidelityRow, ...]
  curves: tuple[Mapping[str, Any], ...]

  def by_skill(self) -> Iterator[tuple[SkillRow, ...]]:
    """Yields one tuple for each skill: its row for every model, in the order of `models`."""
    for first in range(0, len(self.skills), len(self.models)):
      yield self.skills[first : first + len(self.models)]

  @property
  def labels(self) -> tuple[str, ...]:
    """Returns a label for each model: its role, or its name if several models have the same role.

    The role 'teacher' is written 'stack', since a teacher is a base model with a stack of adapters.
    """
    counts = collections.Counter(model.role for model in self.models)
    labels = {role: STACK if role == TEACHER else role for role in counts}
    return tuple(labels[model.role] if counts[model.role] == 1 else model.name for model in self.models)

  @property
  def teacher(self) -> ModelRow | None:
    """Returns the teacher's row, or None if no teacher was measured."""
    return next((model for model in self.models if model.role == TEACHER), None)

  @property
  def has_retention(self) -> bool:
    """Returns True if both a base and a teacher were measured, which retention needs."""
    return {BASE, TEACHER} <= {model.role for model in self.models}

  def to_json(self) -> dict[str, Any]:
    """Returns the report as plain values for JSON."""
    return {"schema": SCHEMA, **dataclasses.asdict(self)}


def is_measured(row: ModelRow | SkillRow | FidelityRow) -> bool:
  """Returns True for a model that is compared with the teacher: one that is neither the base nor the teacher."""
  return row.role not in (BASE, TEACHER)
