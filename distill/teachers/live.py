"""A teacher that is a model in memory."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from distill.adapters import routed
from distill.models.config import DecoderConfig
from distill.models.decoder import Decoder
from distill.types import NO_CAPTURE, Batch, Capture, DenseSignal, ModelOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiveTeacher:
  """A teacher in memory: a decoder and its stacked parameters.

  Its adapters are merged into the parameters, or each row of a batch uses its own set of them (`adapters.routed`).
  """

  decoder: Decoder
  params: Mapping[str, Any]
  # The recipe names the model and its adapters.
  identity: ClassVar[str] = ""

  @property
  def config(self) -> DecoderConfig:
    """The decoder's architecture."""
    return self.decoder.config

  @property
  def width(self) -> int:
    """Width D of the hidden states."""
    return self.config.width

  @property
  def depth(self) -> int:
    """Number of layers."""
    return len(self.config.layers)

  @property
  def vocab_size(self) -> int:
    """Vocabulary size V, without padding."""
    return self.config.vocab_size

  def shardings(self, mesh: Mesh) -> dict[str, NamedSharding]:
    """Returns the sharding of every parameter on `mesh`."""
    return routed.shardings(self.decoder, self.params, mesh=mesh)

  def signal(
    self, params: Mapping[str, Any], *, batch: Batch, capture: Capture = NO_CAPTURE, dtype: Any = jnp.bfloat16
  ) -> DenseSignal:
    """Returns next-token distributions and captured activations for `batch`, as `Teacher.signal` describes.

    Each row is computed with the adapters of its route, if the teacher has routes.
    """
    params = jax.lax.stop_gradient(dict(params))
    if routed.is_routed(params):
      return self._routed(params, batch, capture, dtype)
    output = self.decoder.apply(
      params,
      tokens=batch.tokens,
      segments=batch.segments,
      positions=batch.positions,
      capture=capture,
      dtype=dtype,
    )
    return _signal(output)

  def _routed(self, params, batch, capture, dtype) -> DenseSignal:
    routes = jnp.zeros(batch.tokens.shape[:1], jnp.int32) if batch.routes is None else batch.routes

    def row(tokens, segments, positions, route):
      chosen, tokens = routed.select_route(params, tokens=tokens, route=route)
      output = self.decoder.apply(
        chosen,
        tokens=tokens[None],
        segments=segments[None],
        positions=positions[None],
        capture=capture,
        dtype=dtype,
      )
      # The readout is the same for all rows; the vmap would copy it for each.
      return jax.tree.map(lambda x: x[0], (output.hidden, output.layers, output.mixers, output.qkv))

    hidden, layers, mixers, qkv = jax.vmap(row)(batch.tokens, batch.segments, batch.positions, routes)
    base = {name: x for name, x in params.items() if not name.endswith(routed.SUFFIXES)}
    hidden, readout = routed.widen_readout(
      params, hidden=hidden, readout=self.decoder.module(base).readout(dtype), routes=routes
    )
    return DenseSignal(hidden=hidden, readout=readout, layers=layers, mixers=mixers, qkv=qkv)


def _signal(output: ModelOutput) -> DenseSignal:
  return DenseSignal(
    hidden=output.hidden, readout=output.readout, layers=output.layers, mixers=output.mixers, qkv=output.qkv
  )
