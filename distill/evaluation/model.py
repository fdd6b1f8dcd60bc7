"""What evaluation asks of a model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from distill.models.decoder import Decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """A decoder with stacked parameters, evaluated with float32 operands.

  Attributes:
    name: Where it was read, for the report.
    decoder: Its architecture.
    params: Its stacked parameters.
  """

  name: str
  decoder: Decoder
  params: Mapping[str, Any]

  def output(self, params, *, tokens, segments, positions):
    """The decoder's output; `params` are passed apart so that a jitted caller takes them as an argument."""
    return self.decoder.apply(params, tokens=tokens, segments=segments, positions=positions, dtype=jnp.float32)

  @property
  def size(self) -> int:
    """Number of parameters."""
    return sum(int(x.size) for x in self.params.values())
