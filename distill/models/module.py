"""The modules of a whole decoder: repeated patterns of layers are stacked and scanned."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from distill.models.config import DecoderConfig, groups
from distill.models.layer import Layer, block_norm
from distill.nn.embedding import Embedding
from distill.nn.linear import Linear
from distill.nn.param import Init
from distill.types import ModelOutput, Readout


class DecoderModule(nnx.Module):
  """Embedding, groups of stacked layers, final norm, head: the modules behind `Decoder`."""

  def __init__(self, config: DecoderConfig, key: Key[Array, ""]):
    init = Init(key)
    self.config = config
    self.embed = Embedding(init.child("embed"), vocab_size=config.vocab_size, width=config.width)
    self.positions = (
      Embedding(init.child("positions"), vocab_size=config.max_positions, width=config.width)
      if config.learned_positions
      else None
    )
    self.groups = nnx.List(
      nnx.List(
        Layer(Init(key, repeats=group.repeats, scope=f".groups.{g}.{j}"), layer=layer, config=config)
        for j, layer in enumerate(group.pattern)
      )
      for g, group in enumerate(groups(config.layers))
    )
    self.norm = block_norm(init.child("norm"), config=config)
    shape = (config.width, config.vocab_size)
    self.head = None if config.tie_embeddings else Linear(init.child("head"), shape=shape, axes=("embed", "vocab"))

  def readout(self, dtype) -> Readout:
    """The head, or the transposed embedding when tied, with operands in `dtype`."""
    kernel = self.embed.table[...].T if self.head is None else self.head.kernel[...]
    return Readout(
      kernel=kernel.astype(dtype),
      softcap=self.config.logit_softcap,
      scale=self.config.logit_scale,
      vocab_size=self.config.vocab_size,
    )

  def embedded(self, tokens, positions, dtype):
    """Embedded tokens [*B,D], float32."""
    x, scale = self.embed(tokens), self.config.embed_scale
    if scale != 1.0:
      x = x * (jnp.asarray(scale, dtype).astype(x.dtype) if self.config.round_embed_scale else scale)
    return x if self.positions is None else x + self.positions(positions)

  def __call__(self, tokens, *, segments, positions, capture, dtype) -> ModelOutput:
    x = self.embedded(tokens, positions, dtype)
    captured = jnp.zeros((len(capture), *x.shape), x.dtype)
    for group, layers in zip(groups(self.config.layers), self.groups, strict=True):
      slots = [
        [capture.index(i) if (i := group.layer(repeat, j)) in capture else len(capture) for j in range(len(layers))]
        for repeat in range(group.repeats)
      ]
      graph, state = nnx.split(layers)

      def body(carry, xs, graph=graph):
        x, captured = carry
        state, slots = xs
        for j, layer in enumerate(nnx.merge(graph, state)):
          x = layer(x, segments=segments, positions=positions, dtype=dtype)
          captured = captured.at[slots[j]].set(x, mode="drop") if capture else captured
        return (x, captured), None

      (x, captured), _ = jax.lax.scan(body, (x, captured), (state, jnp.asarray(slots)))
    return ModelOutput(hidden=self.norm(x), captured=tuple(captured), readout=self.readout(dtype))

  def init_cache(self, batch: int, *, length: int, dtype) -> list[list[Any]]:
    """An empty cache for every layer, stacked like the parameters."""

    def stacked(layer: Layer, repeats: int):
      cache = layer.mixer.init_cache(batch, length=length, dtype=layer.mixer_dtype(dtype))
      return jax.tree.map(lambda x: jnp.broadcast_to(x, (repeats, *x.shape)), cache)

    pairs = zip(groups(self.config.layers), self.groups, strict=True)
    return [[stacked(layer, group.repeats) for layer in layers] for group, layers in pairs]

  def step(self, tokens, *, cache, positions, dtype) -> tuple[ModelOutput, list[list[Any]]]:
    """Output for one token a row, hidden [B,D], and the cache after it."""
    x, after = self.embedded(tokens, positions, dtype), []
    for layers, caches in zip(self.groups, cache, strict=True):
      graph, state = nnx.split(layers)

      def body(x, xs, graph=graph):
        state, caches = xs
        new = []
        for layer, one in zip(nnx.merge(graph, state), caches, strict=True):
          x, one = layer.step(x, cache=one, positions=positions, dtype=dtype)
          new.append(one)
        return x, new

      x, caches = jax.lax.scan(body, x, (state, caches))
      after.append(caches)
    return ModelOutput(hidden=self.norm(x), captured=(), readout=self.readout(dtype)), after
