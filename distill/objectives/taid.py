"""Loss term: TAID, forward KL to an interpolation of teacher and student (2501.16937)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from distill.configuration import option
from distill.losses import divergences
from distill.losses.divergences import Divergence
from distill.objectives.divergence_terms import DivergenceTerm
from distill.objectives.term import LossContext, Scalar, TermState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taid(DivergenceTerm):
  """KL(r ‖ student), where the target r interpolates between the student (t = 0) and the teacher (t = 1).

  t grows during the stage. The state holds three scalars: t, the previous loss, and the momentum, which is a moving
  average of the loss's relative decrease.
  """

  kind: ClassVar[str] = "taid"

  t_start: float = option(0.4, least=0, most=1, help="Share of the teacher in the target at the first step.")
  t_end: float = option(1.0, least=0, most=1, help="Share of the teacher in the target at the last step.")
  alpha: float = option(
    5e-4, least=0, most=1, help="How far the share runs ahead of a linear schedule; further while the loss falls."
  )

  def divergence(self) -> Divergence:
    """Returns f(teacher's log-probabilities, student's log-probabilities, t), which computes KL(r ‖ student)."""
    return lambda p, q, t: divergences.taid(p, q, t=t)

  def extra(self, state: TermState) -> tuple[Scalar, ...]:
    """Returns (t,), the teacher's share in the target, which the divergence takes as its last argument."""
    return (state["t"],)

  def initial_state(self) -> TermState:
    """Returns the state before the first step: t = `t_start`, momentum 0 and previous loss ∞, which means none."""
    return {"t": jnp.float32(self.t_start), "momentum": jnp.float32(0.0), "last": jnp.float32(jnp.inf)}

  def next_state(self, state: TermState, *, value: Scalar, reference: Scalar, context: LossContext) -> TermState:
    """Returns the next state; t, the teacher's share in the target, rises to at most `t_end`.

    The new t is the larger of two values: a straight line over the stage from `t_start` to `t_end`, and the old t plus
    alpha · sigmoid(momentum) · (1 − old t), which grows faster while the loss falls.

    Args: as `Term.next_state`.
    """
    fallen = jnp.where(jnp.isfinite(state["last"]), (state["last"] - value) / state["last"], 0.0)
    momentum = 0.99 * state["momentum"] + 0.01 * fallen
    line = self.t_start + (self.t_end - self.t_start) * ((context.step + 1) / context.steps)
    ahead = state["t"] + self.alpha * jax.nn.sigmoid(momentum) * (1.0 - state["t"])
    t = jnp.minimum(self.t_end, jnp.maximum(line, ahead))
    return {"t": t, "momentum": momentum, "last": value}
