"""Loss terms: divergences between the teacher's and the student's next-token distributions."""

import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp

from distill.configuration import option
from distill.errors import InputError
from distill.losses import divergences
from distill.losses.divergences import Divergence
from distill.losses.token_losses import TokenLoss, divergence_loss
from distill.objectives.term import LossContext, Scalar, Setting, Term, TermState
from distill.schedules import SCHEDULES, ScheduleConfig, schedule
from distill.teachers.targets import Targets


@dataclasses.dataclass(frozen=True, kw_only=True)
class DivergenceTerm(Term):
  """Base class of terms that compare the student's next-token distribution with the teacher's.

  Attributes:
    labelled: True if the function that the method `divergence` returns takes labels as its third argument. They are
      column indices: for each token, the column of the log-probabilities that holds the token's label.
    linear_in_teacher: True if the gradient is linear in the teacher's probabilities. Its mean over sampled targets then
      equals the gradient for the teacher's full distribution.
  """

  runs_teacher: ClassVar[bool] = True
  reference: ClassVar[bool] = True
  labelled: ClassVar[bool] = False
  linear_in_teacher: ClassVar[bool] = False

  temperature: float | ScheduleConfig = option(
    1.0, help="Divides the logits of both models: a number or a schedule.", above=0, kinds=SCHEDULES
  )
  temperature_squared: bool = option(
    True, help="Multiply the divergence by the square of the temperature (Hinton et al. 2015, 1503.02531)."
  )

  def bind(self, setting: Setting, *, key: str) -> Term:
    """Checks the temperature's schedule against the length of the stage, and returns the term unchanged.

    Raises:
      InputError: The schedule's warm-up is not shorter than the stage, or the temperature is not always above 0.
    """
    schedule(self.temperature, key=f"{key}.temperature", steps=setting.steps, above=0)
    return self

  def check_targets(self, targets: Targets, *, key: str) -> None:
    """Checks that the targets of a teacher cache can replace the teacher's full distribution in this term.

    Raises:
      InputError: Sampled targets would bias the gradient, or the targets were made at another temperature.
    """
    if targets.sampled and not self.linear_in_teacher:
      raise InputError(
        f"{key}.kind: the gradient of {self.kind} is biased if the teacher cache holds sampled targets; use "
        f"{ForwardKl.kind}, or a cache of top_k targets"
      )
    if self.temperature != targets.temperature:
      raise InputError(
        f"{key}.temperature is {self.temperature}, but the teacher cache was made at temperature "
        f"{targets.temperature}; use the same number for both"
      )

  def token_loss(self, context: LossContext, state: TermState) -> TokenLoss:
    """Returns the divergence as a loss per token, at the temperature of the current step."""
    temperature = context.at(self.temperature)
    return divergence_loss(
      self.divergence(),
      labelled=self.labelled,
      weight=jnp.square(temperature) if self.temperature_squared else 1.0,
      temperature=temperature,
      extra=self.extra(state),
    )

  def divergence(self) -> Divergence:
    """Returns the divergence as a function of the teacher's and the student's log-probabilities."""
    raise NotImplementedError

  def extra(self, state: TermState) -> tuple[Scalar, ...]:
    """Returns the further arguments of the divergence, read from the term's state; () by default.

    The function that the method `divergence` returns takes these scalars as its last arguments.
    """
    return ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardKl(DivergenceTerm):
  """The forward KL divergence, KL(teacher ‖ student)."""

  kind: ClassVar[str] = "forward_kl"
  linear_in_teacher: ClassVar[bool] = True

  def divergence(self) -> Divergence:
    """Returns the function `divergences.forward_kl` itself: `divergence_loss` recognises it and uses a cheaper form."""
    return divergences.forward_kl


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReverseKl(DivergenceTerm):
  """The reverse KL divergence, KL(student ‖ teacher)."""

  kind: ClassVar[str] = "reverse_kl"

  def divergence(self) -> Divergence:
    """Returns reverse KL as a function of the log-probabilities of both models."""
    return divergences.reverse_kl


@dataclasses.dataclass(frozen=True, kw_only=True)
class Jsd(DivergenceTerm):
  """Generalised Jensen-Shannon divergence (2306.13649)."""

  kind: ClassVar[str] = "jsd"

  beta: float = option(0.5, least=0, most=1, help="Share of the teacher in the mixture; 0 is forward, 1 reverse KL.")

  def divergence(self) -> Divergence:
    """Returns the JSD, a function of both models' log-probabilities; `beta` is the teacher's share of the mixture."""
    return functools.partial(divergences.jsd, beta=self.beta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SkewTerm(DivergenceTerm):
  """Base class of skew divergences: the KL from one model's distribution to a mixture of both models'."""

  alpha: float = option(0.1, least=0, most=1, help="Share of the first distribution in the mixture, below 1.")

  def bind(self, setting: Setting, *, key: str) -> Term:
    """Checks `alpha` and the temperature, and returns the term unchanged.

    Raises:
      InputError: `alpha` is 1, at which the divergence is always 0. Or the temperature is not above 0 at every step, or
        the warm-up of the temperature's schedule is not shorter than the stage.
    """
    if self.alpha == 1.0:
      raise InputError(f"{key}.alpha: got {self.alpha}, at which {self.kind} is always 0; use a number below 1")
    return super().bind(setting, key=key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkewKl(_SkewTerm):
  """The skew KL divergence, KL(teacher ‖ mixture of teacher and student) (DistiLLM, 2402.03898)."""

  kind: ClassVar[str] = "skew_kl"

  def divergence(self) -> Divergence:
    """Returns skew KL, a function of both models' log-probabilities; `alpha` is the teacher's share of the mixture."""
    return functools.partial(divergences.skew_kl, alpha=self.alpha)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkewReverseKl(_SkewTerm):
  """The skew reverse KL divergence, KL(student ‖ mixture of student and teacher) (DistiLLM, 2402.03898)."""

  kind: ClassVar[str] = "skew_reverse_kl"

  def divergence(self) -> Divergence:
    """Returns skew reverse KL, a function of both log-probabilities; `alpha` is the student's share of the mixture."""
    return functools.partial(divergences.skew_reverse_kl, alpha=self.alpha)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TotalVariation(DivergenceTerm):
  """Total variation distance between the teacher's and the student's distribution, from 0 to 1."""

  kind: ClassVar[str] = "total_variation"

  def divergence(self) -> Divergence:
    """Returns the total variation distance as a function of the log-probabilities of both models."""
    return divergences.total_variation


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlphaBeta(DivergenceTerm):
  """The α-β divergence (Cichocki et al. 2011; ABKD, 2505.04560)."""

  kind: ClassVar[str] = "alpha_beta"

  alpha: float = option(0.5, help="Power of the teacher; (1, 0) is forward, (0, 1) reverse KL.")
  beta: float = option(0.5, help="Power of the student.")

  def bind(self, setting: Setting, *, key: str) -> Term:
    """Checks `alpha`, `beta` and the temperature, and returns the term unchanged.

    Raises:
      InputError: `alpha` + `beta` is 0, where the divergence is undefined, the temperature is not always above 0, or
        the warm-up of its schedule is not shorter than the stage.
    """
    if self.alpha + self.beta == 0:
      raise InputError(f"{key}: alpha {self.alpha} + beta {self.beta} is 0, which is not allowed; change one of them")
    return super().bind(setting, key=key)

  def divergence(self) -> Divergence:
    """Returns the α-β divergence, a function of both models' log-probabilities, with the options `alpha` and `beta`."""
    return functools.partial(divergences.alpha_beta, alpha=self.alpha, beta=self.beta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoupledKl(DivergenceTerm):
  """Decoupled knowledge distillation (DKD, 2203.08679): a weighted sum of two KL divergences.

  One compares the pair of probabilities (label, all other tokens), the other the distribution among the other tokens.
  """

  kind: ClassVar[str] = "dkd"
  labelled: ClassVar[bool] = True

  alpha: float = option(1.0, help="Factor of the KL of (label, rest).")
  beta: float = option(1.0, help="Factor of the KL among the rest.")

  def divergence(self) -> Divergence:
    """Returns decoupled KL, a function of both models' log-probabilities; `alpha` and `beta` multiply its two KLs."""
    return functools.partial(divergences.decoupled_kl, alpha=self.alpha, beta=self.beta)
