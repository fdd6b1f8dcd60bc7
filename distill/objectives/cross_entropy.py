"""Loss term: cross-entropy with the next tokens of the text."""

import dataclasses
from typing import ClassVar

from distill.losses.token_losses import TokenLoss, cross_entropy_loss
from distill.objectives.term import LossContext, Term, TermState


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossEntropy(Term):
  """Negative log-probability of the text's next token, in nats."""

  kind: ClassVar[str] = "cross_entropy"
  reference: ClassVar[bool] = True

  def token_loss(self, context: LossContext, state: TermState) -> TokenLoss:
    """Returns a function that computes the cross-entropy of each token from its logits, as a `TokenLoss`."""
    return cross_entropy_loss()
