"""The protocol of loss terms, and the arguments of its methods: `Setting`, `LossContext` and `LossInputs`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, Key

from distill.configuration import option
from distill.losses.token_losses import TokenLoss
from distill.models.config import DecoderConfig
from distill.schedules import SCHEDULES, ScheduleConfig, schedule
from distill.teachers.targets import Targets
from distill.tree import Params
from distill.types import NO_CAPTURE, Batch, Capture, ModelOutput, TeacherSignal

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


@runtime_checkable
@dataclasses.dataclass(frozen=True, kw_only=True)
class Term(Protocol):
  """One summand of a stage's loss: weight · mean over tokens.

  A term is a frozen dataclass with keyword-only fields made by `configuration.option`: its keys in a recipe. It
  implements either `token_loss` or `loss`; every other member has a default here, which a subclass inherits. A term of
  the package is listed in `objectives.terms.TERMS`. A term of your own needs no change here: a stage names it as
  `{"kind": "my_package.my_module:MyTerm", …}`, where `my_package` can be imported (PYTHONPATH).

  Attributes:
    kind: Name of the term in metrics, and in recipes if it is listed in `TERMS`.
    runs_student: True if the term needs the student to run end to end.
    runs_teacher: True if the term needs a teacher.
    reference: True if the term is part of the weighted sum to which `PairTerm.balanced` scales other terms.
    weight: Number or schedule that the term's mean is multiplied by in the loss.
  """

  kind: ClassVar[str]
  runs_student: ClassVar[bool] = True
  runs_teacher: ClassVar[bool] = False
  reference: ClassVar[bool] = False

  weight: float | ScheduleConfig = option(
    1.0, help="Factor of the term's mean over tokens: a number or a schedule.", kinds=SCHEDULES
  )

  def bind(self, setting: Setting, *, key: str) -> "Term":
    """Checks the options against a stage and its models, and returns the term with model-dependent defaults filled in.

    All other methods are called on the returned term.

    Raises:
      InputError: The options do not fit; the message begins with `key`, the term's place in the recipe.
    """
    return self

  def student_capture(self) -> Capture:
    """Returns a request for the student activations that the loss reads when the student runs end to end."""
    return NO_CAPTURE

  def teacher_capture(self) -> Capture:
    """Returns a request for the teacher activations that the loss reads besides the next-token distribution."""
    return NO_CAPTURE

  def check_targets(self, targets: Targets, *, key: str) -> None:
    """Checks that the targets of a teacher cache can replace the teacher's full distribution in this term.

    Raises:
      InputError: The targets cannot be used with this term.
    """
    del targets, key

  def init_params(self, setting: Setting, *, key: Key[Array, ""]) -> Params:
    """Returns initial values of the term's own trained parameters, such as projectors, by name.

    Terms that give the same name share the parameter, in one stage or in several.
    """
    return {}

  def initial_state(self) -> TermState:
    """Returns the term's state before the first step of a stage; `next_state` updates it after every step."""
    return {}

  def next_state(self, state: TermState, *, value: Scalar, reference: Scalar, context: LossContext) -> TermState:
    """Returns the term's state after a step, which the next step's loss is computed with.

    Args:
      state: State before the step, with which its loss was computed.
      value: The term's mean over the step's global batch.
      reference: Weighted sum of the means of those terms of the stage whose attribute `reference` is True.
      context: Step, counts and states that the step's loss was computed with.
    """
    return state

  def factor(self, state: TermState) -> float | Scalar:
    """Returns a factor that multiplies the term's weight, computed from its state; 1 by default."""
    return 1.0

  def token_loss(self, context: LossContext, state: TermState) -> TokenLoss | None:
    """Returns a function that computes the term's loss for each token from its logits, as a `TokenLoss`.

    A term that implements `loss` instead returns None. All token losses of a stage are computed in one pass over the
    logits, a chunk of tokens at a time. The mean of a term is over the tokens with a target. `TokenLoss.weight`
    multiplies this mean, in addition to the term's option `weight`.
    """
    return None

  def loss(self, inputs: LossInputs, context: LossContext) -> Scalar:
    """Returns this micro-batch's share of the mean over the global batch.

    The share is a sum over the micro-batch's tokens, divided by one of the global counts in `context.totals`.
    """
    raise AssertionError(f"{type(self).__name__} implements neither token_loss nor loss")
