"""Loss term: the z-loss, which keeps the normaliser of the student's softmax near one (PaLM, 2204.02311)."""

import dataclasses
from typing import ClassVar

from distill.losses.token_losses import TokenLoss, z_loss
from distill.objectives.term import LossContext, Term, TermState


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZLoss(Term):
  """The squared logsumexp of the student's logits."""

  kind: ClassVar[str] = "z_loss"

  def token_loss(self, context: LossContext, state: TermState) -> TokenLoss:
    """Returns a function that computes the z-loss of each token from its logits, as a `TokenLoss`."""
    return z_loss()
