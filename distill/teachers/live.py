"""A teacher that is a model in memory."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distill.models.decoder import Decoder
from distill.types import Batch, DenseSignal


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiveTeacher:
  """A decoder and its stacked parameters, adapters already merged."""

  decoder: Decoder
  params: Mapping[str, Any]

  def signal(
    self, params: Mapping[str, Any], *, batch: Batch, capture: tuple[int, ...] = (), dtype: Any = jnp.bfloat16
  ) -> DenseSignal:
    """What the teacher says of `batch`; no gradient flows into it.

    `params` are passed apart from the value so that a jitted step takes them as an argument, not as constants.
    """
    output = self.decoder.apply(
      params,
      tokens=batch.tokens,
      segments=batch.segments,
      positions=batch.positions,
      capture=capture,
      dtype=dtype,
    )
    hidden, readout, captured = jax.lax.stop_gradient((output.hidden, output.readout, output.captured))
    return DenseSignal(hidden=hidden, readout=readout, captured=captured)
