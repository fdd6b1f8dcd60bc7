"""Loss term: the load-balancing loss of MoE layers."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from distill.errors import InputError
from distill.objectives.term import LossContext, LossInputs, Scalar, Setting, Term


@dataclasses.dataclass(frozen=True, kw_only=True)
class Balance(Term):
  """Load imbalance of the student's experts, averaged over MoE layers and rows; 1, the minimum, for an even load.

  Each row is weighted by its number of tokens.
  """

  kind: ClassVar[str] = "balance"

  def bind(self, setting: Setting, *, key: str) -> Term:
    """Returns the term unchanged, after a check that the student has MoE layers.

    Raises:
      InputError: The student has no MoE layers.
    """
    if not any(layer.mlp is not None and layer.mlp.routed for layer in setting.student.layers):
      raise InputError(f"{key}: the balance term needs an MoE student; this student has no MoE layers")
    return self

  def loss(self, inputs: LossInputs, context: LossContext) -> Scalar:
    """Returns Σ (load imbalance · tokens) over the micro-batch's rows, divided by all tokens of the global batch.

    Padding does not count. The sum of this over all micro-batches is the mean load imbalance.
    """
    assert inputs.output is not None and inputs.output.balance is not None, (
      "the balance term needs a student with MoE layers"
    )
    lengths = jnp.sum(inputs.batch.segments > 0, axis=1).astype(jnp.float32)
    return jnp.sum(inputs.output.balance * lengths) / context.totals["present"]
