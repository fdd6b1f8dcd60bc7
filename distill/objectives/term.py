"""The base class of loss terms: the protocol that each summand of a stage's loss implements."""

import dataclasses
from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Array, Key

from distill.configuration import option
from distill.losses.token_losses import TokenLoss
from distill.objectives.context import LossContext, LossInputs, Scalar, Setting, TermState
from distill.schedules import SCHEDULES, ScheduleConfig
from distill.teachers.targets import Targets
from distill.tree import Params
from distill.types import NO_CAPTURE, Capture


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
    reference: True if this term is in the weighted sum to which balanced terms of the same stage are scaled.
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
    """Returns the activations of the student, run end to end, that the loss reads."""
    return NO_CAPTURE

  def teacher_capture(self) -> Capture:
    """Returns the teacher activations that the loss reads in addition to the next-token distribution."""
    return NO_CAPTURE

  def check_targets(self, targets: Targets, *, key: str) -> None:
    """Checks that the targets of a teacher cache can replace the teacher's full distribution in this term.

    Raises:
      InputError: The targets cannot be used with this term.
    """
    del targets, key

  def init_params(self, setting: Setting, *, key: Key[Array, ""]) -> Params:
    """Returns the term's own trained parameters, such as projectors; names are unique across a recipe's terms."""
    return {}

  def initial_state(self) -> TermState:
    """Returns the term's state before the first step of a stage; `next_state` updates it after every step."""
    return {}

  def next_state(self, state: TermState, *, value: Scalar, reference: Scalar, context: LossContext) -> TermState:
    """Returns the term's state after a step, which the next step's loss is computed with.

    Args:
      state: State before the step, with which its loss was computed.
      value: The term's mean over the step's global batch.
      reference: Weighted sum of the means of the stage's reference terms.
      context: Step, counts and states that the step's loss was computed with.
    """
    return state

  def factor(self, state: TermState) -> float | Scalar:
    """Returns a factor that multiplies the term's weight, computed from its state; 1 by default."""
    return 1.0

  def token_loss(self, context: LossContext, state: TermState) -> TokenLoss | None:
    """Returns the term as a loss of each token's logits, or None if it implements `loss` instead.

    All token losses of a stage are computed in one pass over the logits, a chunk of tokens at a time. The mean is over
    predicted tokens; `TokenLoss.weight` multiplies it, before the term's own weight.
    """
    return None

  def loss(self, inputs: LossInputs, context: LossContext) -> Scalar:
    """Returns this micro-batch's share of the mean: a sum over its tokens, divided by a count of `context.totals`."""
    raise AssertionError(f"{type(self).__name__} implements neither token_loss nor loss")
