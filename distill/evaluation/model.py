"""A model under evaluation."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from distill.models.decoder import Decoder

# The roles that others are measured against. Every other role (student, control, …) is measured.
BASE, TEACHER = "base", "teacher"
STUDENT = "student"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
  """A decoder with stacked parameters, evaluated with float32 operands.

  Attributes:
    role: Its part in a comparison: 'base', 'teacher' (the base with its stack of adapters), 'student', or another word.
    name: Its name in the report.
    decoder: Its architecture.
    params: Its stacked parameters.
  """

  role: str
  name: str
  decoder: Decoder
  params: Mapping[str, Any]

  def output(self, params, *, tokens, segments, positions):
    """Runs the decoder; `params` come as an argument, so that a jitted caller does not make them constants."""
    return self.decoder.apply(params, tokens=tokens, segments=segments, positions=positions, dtype=jnp.float32)

  @property
  def size(self) -> int:
    """Number of parameters."""
    return sum(int(x.size) for x in self.params.values())
