"""A teacher that is a model in memory."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from distill.adapters import live
from distill.models.decoder import Decoder
from distill.types import Batch, DenseSignal


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiveTeacher:
  """A decoder and its stacked parameters, with adapters merged, or beside them by route (`adapters.live.build`)."""

  decoder: Decoder
  params: Mapping[str, Any]

  @property
  def width(self) -> int:
    """D of its hidden states."""
    return self.decoder.config.width

  @property
  def depth(self) -> int:
    """Its layers."""
    return len(self.decoder.config.layers)

  def shardings(self, mesh: Mesh) -> dict[str, NamedSharding]:
    """Where every parameter lives on `mesh`."""
    return live.shardings(self.decoder, self.params, mesh=mesh)

  def signal(
    self,
    params: Mapping[str, Any],
    *,
    batch: Batch,
    capture: tuple[int, ...] = (),
    mixers: tuple[int, ...] = (),
    dtype: Any = jnp.bfloat16,
  ) -> DenseSignal:
    """What the teacher says of `batch`, each row under its route; no gradient flows into it.

    `params` are passed apart from the value so that a jitted step takes them as an argument, not as constants.
    """
    params = jax.lax.stop_gradient(dict(params))
    if live.is_live(params):
      return self._routed(params, batch, capture, mixers, dtype)
    output = self.decoder.apply(
      params,
      tokens=batch.tokens,
      segments=batch.segments,
      positions=batch.positions,
      capture=capture,
      mixers=mixers,
      dtype=dtype,
    )
    return DenseSignal(hidden=output.hidden, readout=output.readout, captured=output.captured, mixed=output.mixed)

  def _routed(self, params, batch, capture, mixers, dtype) -> DenseSignal:
    routes = jnp.zeros(batch.tokens.shape[:1], jnp.int32) if batch.routes is None else batch.routes

    def row(tokens, segments, positions, route):
      chosen, tokens = live.choose(params, tokens=tokens, route=route)
      output = self.decoder.apply(
        chosen,
        tokens=tokens[None],
        segments=segments[None],
        positions=positions[None],
        capture=capture,
        mixers=mixers,
        dtype=dtype,
      )
      return jax.tree.map(lambda x: x[0], (output.hidden, output.captured, output.mixed))

    hidden, captured, mixed = jax.vmap(row)(batch.tokens, batch.segments, batch.positions, routes)
    base = {name: x for name, x in params.items() if not name.endswith(live.SUFFIXES)}
    hidden, readout = live.widen(params, hidden=hidden, readout=self.decoder.module(base).readout(dtype), routes=routes)
    return DenseSignal(hidden=hidden, readout=readout, captured=captured, mixed=mixed)
