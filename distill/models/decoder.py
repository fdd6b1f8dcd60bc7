"""The one decoder: layers are data, repeated patterns are stacked and scanned."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int, Key

from distill.errors import InputError
from distill.models.config import DecoderConfig, GatedDelta, LayerConfig, groups
from distill.nn.attention import Attention, AttentionMixer
from distill.nn.embedding import Embedding
from distill.nn.gated_delta import GatedDeltaMixer
from distill.nn.linear import Linear
from distill.nn.mlp import DenseMlp
from distill.nn.moe import Moe, MoeMlp
from distill.nn.norm import LayerNorm, RMSNorm
from distill.nn.param import Init
from distill.parallel.mesh import sharding
from distill.tree import Params, flatten, unflatten
from distill.types import ModelOutput, Readout


def _mixer(init: Init, *, layer: LayerConfig, config: DecoderConfig) -> AttentionMixer | GatedDeltaMixer:
  mixer = layer.mixer
  if isinstance(mixer, Attention):
    return AttentionMixer(
      init, spec=mixer, width=config.width, norm_eps=config.norm_eps, norm_offset=config.norm_offset
    )
  assert isinstance(mixer, GatedDelta), mixer
  return GatedDeltaMixer(
    init,
    width=config.width,
    num_key_heads=mixer.num_key_heads,
    num_value_heads=mixer.num_value_heads,
    key_head_dim=mixer.key_head_dim,
    value_head_dim=mixer.value_head_dim,
    conv_width=mixer.conv_width,
    norm_eps=config.norm_eps,
  )


def _norm(init: Init, *, config: DecoderConfig) -> RMSNorm | LayerNorm:
  if config.norm == "layer":
    return LayerNorm(init, width=config.width, eps=config.norm_eps)
  return RMSNorm(init, width=config.width, eps=config.norm_eps, offset=config.norm_offset)


class Layer(nnx.Module):
  """x + mixer(x), then x + mlp(x), with norms before or after each; the residual stream stays float32.

  Two kinds of layer take float32 operands whatever the dtype of the computation. In a model with routers, rounding
  them moves the residual stream enough to flip choices of experts, each an error of order one (gpt-oss of two to four
  layers: 4 to 10 % of the logits' norm with bf16 operands, 1 to 4 % with them in the experts alone, 0.3 % without). A
  delta rule norms what it reads, however little that is, and with it what was rounded (5 % against 2 % without).
  """

  def __init__(self, init: Init, *, layer: LayerConfig, config: DecoderConfig):
    self.scale = config.residual_scale
    self.routed = any(isinstance(one.mlp, Moe) for one in config.layers)
    self.exact_mixer = self.routed or isinstance(layer.mixer, GatedDelta)

    def norm(name: str, *places: str) -> RMSNorm | LayerNorm | None:
      return _norm(init.child(name), config=config) if config.norms in places else None

    self.mixer_norm = norm("mixer_norm", "pre", "both")
    self.mixer = _mixer(init.child("mixer"), layer=layer, config=config)
    self.mixer_post_norm = norm("mixer_post_norm", "post", "both")
    self.mlp_norm = norm("mlp_norm", "pre", "both")
    kind = MoeMlp if isinstance(layer.mlp, Moe) else DenseMlp
    self.mlp = kind(init.child("mlp"), spec=layer.mlp, width=config.width)  # type: ignore[arg-type]
    self.mlp_post_norm = norm("mlp_post_norm", "post", "both")

  def mixer_dtype(self, dtype):
    """Dtype of the mixer's operands and caches where that of the computation is `dtype`."""
    return jnp.float32 if self.exact_mixer else dtype

  def _add(self, x, y, norm):
    y = y if norm is None else norm(y)
    return x + (y if self.scale == 1.0 else y * self.scale)

  def _finish(self, x, mixed, dtype):
    x = self._add(x, mixed, self.mixer_post_norm)
    inner = x if self.mlp_norm is None else self.mlp_norm(x)
    dtype = jnp.float32 if self.routed else dtype
    return self._add(x, self.mlp(inner, dtype=dtype), self.mlp_post_norm)

  def __call__(self, x, *, segments, positions, dtype):
    """The block's output; operands of projections are `dtype`."""
    inner = x if self.mixer_norm is None else self.mixer_norm(x)
    mixed = self.mixer(inner, segments=segments, positions=positions, dtype=self.mixer_dtype(dtype))
    return self._finish(x, mixed, dtype)

  def step(self, x, *, cache, positions, dtype):
    """One position a row, and the mixer's cache after it."""
    inner = x if self.mixer_norm is None else self.mixer_norm(x)
    mixed, cache = self.mixer.step(inner, cache=cache, positions=positions, dtype=self.mixer_dtype(dtype))
    return self._finish(x, mixed, dtype), cache


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
    self.norm = _norm(init.child("norm"), config=config)
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

  def _embed(self, tokens, positions, dtype):
    """Embedded tokens [*B,D], float32."""
    x, scale = self.embed(tokens), self.config.embed_scale
    if scale != 1.0:
      x = x * (jnp.asarray(scale, dtype).astype(x.dtype) if self.config.round_embed_scale else scale)
    return x if self.positions is None else x + self.positions(positions)

  def __call__(self, tokens, *, segments, positions, capture, dtype) -> ModelOutput:
    x = self._embed(tokens, positions, dtype)
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
    x, after = self._embed(tokens, positions, dtype), []
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


class Decoder:
  """A decoder-only language model as pure functions of flat, named parameters.

  Parameters are *stacked* inside: `groups.{g}.{j}.…` with a leading dimension of repeats. `unstack` gives the
  canonical names `layers.{i}.…`, which do not depend on how layers are grouped, and `stack` takes them back.
  """

  def __init__(self, config: DecoderConfig):
    self.config, self._groups = config, groups(config.layers)
    self.graph, self._state = nnx.split(nnx.eval_shape(lambda: DecoderModule(config, jax.random.key(0))))

  def abstract(self) -> Params:
    """Shape and dtype of every stacked parameter."""
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in flatten(self._state).items()}

  def axes(self) -> dict[str, tuple[str | None, ...]]:
    """Logical axes of every stacked parameter."""
    flat = nnx.to_flat_state(self._state)
    return {".".join(map(str, path)): variable.get_metadata()["axes"] for path, variable in flat}

  def shardings(self, mesh: Mesh) -> dict[str, NamedSharding]:
    """Where every stacked parameter lives on `mesh`."""
    axes = self.axes()
    return {name: sharding(mesh, x.shape, axes[name]) for name, x in self.abstract().items()}

  def init(self, key: Key[Array, ""]) -> Params:
    """Fresh stacked parameters; jit it with `out_shardings=shardings(mesh)` to make them in place."""
    return flatten(nnx.state(DecoderModule(self.config, key)))

  def module(self, params: Mapping[str, Any]) -> DecoderModule:
    """The modules with `params` in them, for one pure computation."""
    return nnx.merge(self.graph, unflatten(self._state, params))

  def apply(
    self,
    params: Mapping[str, Any],
    *,
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    capture: tuple[int, ...] = (),
    dtype: Any = jnp.bfloat16,
  ) -> ModelOutput:
    """Final hidden states, the layers in `capture`, and the readout; operands of projections are `dtype`."""
    return self.module(params)(tokens, segments=segments, positions=positions, capture=tuple(capture), dtype=dtype)

  def init_cache(self, params: Mapping[str, Any], *, batch: int, length: int, dtype: Any = jnp.bfloat16) -> Any:
    """Empty caches for decoding `length` positions of `batch` rows.

    Raises:
      InputError: The model has no embedding for so many positions.
    """
    self.check_length(length, what="prompt and text to draw")
    return self.module(params).init_cache(batch, length=length, dtype=dtype)

  def step(
    self,
    params: Mapping[str, Any],
    *,
    cache: Any,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    dtype: Any = jnp.bfloat16,
  ) -> tuple[ModelOutput, Any]:
    """The output [B,D] for the next token of each row, and the caches after it; equals `apply` on the whole prefix."""
    return self.module(params).step(tokens, cache=cache, positions=positions, dtype=dtype)

  def check_length(self, length: int, *, what: str) -> None:
    """Refuses a document that a model of learned positions has no embeddings for.

    Raises:
      InputError: It is longer.
    """
    if self.config.learned_positions and length > self.config.max_positions:
      raise InputError(
        f"{what}: {length} tokens, but the model has learned {self.config.max_positions} positions; give fewer"
      )

  def canonical(self, name: str) -> list[str]:
    """Canonical names of one stacked parameter, in the order of its layers; a name that is not stacked is its own."""
    found = re.match(r"groups\.(\d+)\.(\d+)\.(.*)", name)
    if not found:
      return [name]
    group = self._groups[int(found[1])]
    return [f"layers.{group.layer(repeat, int(found[2]))}.{found[3]}" for repeat in range(group.repeats)]

  def unstack(self, params: Mapping[str, Any]) -> Params:
    """Stacked names -> canonical names; suffixes such as `.lora_a` are carried along."""
    flat: Params = {}
    for name, value in params.items():
      stacked = name.startswith("groups.")
      flat |= {one: value[i] if stacked else value for i, one in enumerate(self.canonical(name))}
    return flat

  def stack(self, canonical: Mapping[str, Any]) -> Params:
    """Canonical names -> stacked names; every layer of a pattern position must hold the same names."""
    places = {
      group.layer(repeat, j): (f"groups.{g}.{j}", repeat)
      for g, group in enumerate(self._groups)
      for j in range(len(group.pattern))
      for repeat in range(group.repeats)
    }
    stacked: Params = {}
    lists: dict[str, dict[int, Any]] = {}
    for name, value in canonical.items():
      found = re.match(r"layers\.(\d+)\.(.*)", name)
      if not found:
        stacked[name] = value
        continue
      prefix, repeat = places[int(found[1])]
      lists.setdefault(f"{prefix}.{found[2]}", {})[repeat] = value
    for name, values in lists.items():
      ordered = [values[repeat] for repeat in range(len(values))]
      stack = jnp.stack if isinstance(ordered[0], jax.Array) else np.stack
      stacked[name] = stack(ordered)
    return stacked
