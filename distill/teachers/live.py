"""A teacher that is a model in memory."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from distill.adapters import live
from distill.models.decoder import Decoder
from distill.models.layer import Layer
from distill.types import Batch, DenseSignal, ModelOutput, Related, before


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
    related: tuple[int, ...] = (),
    dtype: Any = jnp.bfloat16,
  ) -> DenseSignal:
    """What the teacher says of `batch`, each row under its route; no gradient flows into it.

    `params` are passed apart from the value so that a jitted step takes them as an argument, not as constants.
    """
    params = jax.lax.stop_gradient(dict(params))
    if live.is_live(params):
      return self._routed(params, batch, capture, mixers, related, dtype)
    output, found = self._run(
      params,
      tokens=batch.tokens,
      segments=batch.segments,
      positions=batch.positions,
      capture=capture,
      mixers=mixers,
      related=related,
      dtype=dtype,
    )
    return DenseSignal(
      hidden=output.hidden, readout=output.readout, captured=output.captured, mixed=output.mixed, related=found
    )

  def _run(self, params, *, capture, mixers, related, dtype, **rows) -> tuple[ModelOutput, tuple[Related, ...]]:
    """The output, and queries, keys and values of the layers in `related`."""
    asked = tuple(sorted({*capture, *map(before, related)}))
    output = self.decoder.apply(params, **rows, capture=asked, mixers=mixers, dtype=dtype)
    captured = tuple(output.captured[asked.index(layer)] for layer in capture)
    inputs = [output.captured[asked.index(before(layer))] for layer in related]
    places = {"segments": rows["segments"], "positions": rows["positions"]}
    found = self.decoder.apart(params, run=Layer.qkv, inputs=inputs, layers=related, dtype=dtype, **places)
    return dataclasses.replace(output, captured=captured), found

  def _routed(self, params, batch, capture, mixers, related, dtype) -> DenseSignal:
    routes = jnp.zeros(batch.tokens.shape[:1], jnp.int32) if batch.routes is None else batch.routes

    def row(tokens, segments, positions, route):
      chosen, tokens = live.choose(params, tokens=tokens, route=route)
      output, found = self._run(
        chosen,
        tokens=tokens[None],
        segments=segments[None],
        positions=positions[None],
        capture=capture,
        mixers=mixers,
        related=related,
        dtype=dtype,
      )
      return jax.tree.map(lambda x: x[0], (output.hidden, output.captured, output.mixed, found))

    hidden, captured, mixed, found = jax.vmap(row)(batch.tokens, batch.segments, batch.positions, routes)
    base = {name: x for name, x in params.items() if not name.endswith(live.SUFFIXES)}
    hidden, readout = live.widen(params, hidden=hidden, readout=self.decoder.module(base).readout(dtype), routes=routes)
    return DenseSignal(hidden=hidden, readout=readout, captured=captured, mixed=mixed, related=found)
