"""The arguments of loss terms: `Setting` to check their options, `LossContext` and `LossInputs` to compute the loss."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Array, Float, Int

from distill.models.config import DecoderConfig
from distill.schedules import ScheduleConfig, schedule
from distill.tree import Params
from distill.types import Batch, ModelOutput, TeacherSignal

Scalar = Float[Array, ""]
TermState = dict[str, Scalar]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """The stage and the two models that a term is checked against (`Term.bind`).

  Attributes:
    steps: Length of the stage in optimizer steps.
    student: Architecture of the student.
    teacher_depth: Number of the teacher's layers.
    teacher_width: Width D of the teacher's hidden states.
    teacher: Architecture of the teacher; None for a teacher cache, which knows only depth and width.
    layers_from: Index of the teacher layer that each student layer starts from; empty for a student that starts from no
      teacher, None if the layers are not chosen yet.
    has_reference: True if any term of the stage is a reference for balanced terms (`Term.reference`).
  """

  steps: int
  student: DecoderConfig
  teacher_depth: int = 0
  teacher_width: int = 0
  teacher: DecoderConfig | None = None
  layers_from: tuple[int, ...] | None = ()
  has_reference: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossContext:
  """The step, global counts and term states with which a loss is computed.

  Attributes:
    step: Number of optimizer steps already done in the stage.
    steps: Length of the stage in optimizer steps.
    totals: Counts of the GLOBAL batch, so that the shares of micro-batches, devices and hosts simply add up:
      `predicted`, tokens with a target, and `present`, tokens that are not padding.
    states: State of each term that has one, by its index in the stage.
    shards: Number of parts of the mesh that the batch's rows are spread over.
  """

  step: Scalar | Int[Array, ""]
  steps: int
  totals: Mapping[str, Scalar]
  states: Mapping[str, TermState]
  shards: int = 1

  def at(self, spec: float | ScheduleConfig) -> Scalar:
    """Returns the value of `spec`, a number or a schedule (distill/schedules.py), at this step."""
    return schedule(spec, key="schedule", steps=self.steps)(self.step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossInputs:
  """One micro-batch and the activations of both models for it.

  Attributes:
    batch: The micro-batch.
    output: Output of the student run end to end, with the activations that terms need; None if no term needs that run.
    signal: The teacher's output, with the activations that terms need; None if no term needs a teacher.
    params: Trained parameters of the terms (`Term.init_params`).
    run_isolated: run_isolated(method, inputs=…, layers=…) runs single student layers, each on an input [B,T,D] of its
      own, and returns their outputs in the order of `layers`; `method` is a method of `models.layer.Layer`.
  """

  batch: Batch
  output: ModelOutput | None = None
  signal: TeacherSignal | None = None
  params: Params = dataclasses.field(default_factory=dict)
  run_isolated: Callable[..., tuple[Any, ...]] | None = None
