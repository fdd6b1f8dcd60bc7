"""The models that are evaluated: a decoder, its parameters, and its role in the comparison."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distill.models.decoder import Decoder
from distill.types import Batch, ModelOutput

# The roles that others are measured against. Every other role (student, control, …) is measured.
BASE, TEACHER = "base", "teacher"
STUDENT = "student"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
  """A decoder with stacked parameters, evaluated with float32 operands.

  Attributes:
    role: Part in a comparison: 'base', 'teacher' (the base with its adapters), 'student', or any word for other models.
    name: Name in the report.
    decoder: Architecture.
    params: Stacked parameters.
  """

  role: str
  name: str
  decoder: Decoder
  params: Mapping[str, Any]

  @property
  def size(self) -> int:
    """Returns the model's number of parameters."""
    return sum(int(x.size) for x in self.params.values())


@functools.partial(jax.jit, static_argnums=0)
def run(decoder: Decoder, params: Mapping[str, Any], batch: Batch) -> ModelOutput:
  """Returns a decoder's output for a batch, computed with float32 operands.

  Each model is compiled as a separate program: two sharded models in one program gather their weights at the same time,
  in an order that differs between devices, and XLA's CPU backend (jaxlib 0.10) then waits for ever.

  Args:
    decoder: The architecture.
    params: Its stacked parameters.
    batch: Rows of tokens.
  """
  return decoder.apply(
    params, tokens=batch.tokens, segments=batch.segments, positions=batch.positions, dtype=jnp.float32
  )
