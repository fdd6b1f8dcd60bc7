"""The modules of a whole decoder, and the grouping of its layers: repeated patterns are stacked and scanned."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from distill.axes.logical import constrain
from distill.errors import InputError
from distill.models.config import DecoderConfig, LayerConfig
from distill.models.layer import Layer, block_norm
from distill.models.remat import REMAT_POLICIES
from distill.nn.embedding import Embedding
from distill.nn.linear import Linear
from distill.nn.param import Init
from distill.types import INPUT, Capture, ModelOutput, Readout, before

# Logical axes of the residual stream [B,T,D].
ACTIVATIONS = ("batch", None, None)


@dataclasses.dataclass(frozen=True)
class Group:
  """Consecutive layers that repeat a pattern; the layers at the same position of the pattern are stacked and scanned.

  Attributes:
    start: Index of the first layer in the decoder.
    pattern: The layers of one repeat.
    repeats: Number of times that the pattern occurs.
  """

  start: int
  pattern: tuple[LayerConfig, ...]
  repeats: int

  def layer(self, repeat: int, position: int) -> int:
    """Returns a layer's index in the decoder, from the number of its repeat and its position in the pattern.

    All three count from 0.
    """
    return self.start + repeat * len(self.pattern) + position


def singles(layers: Sequence[LayerConfig]) -> tuple[Group, ...]:
  """Returns one group for each layer: a pattern of this layer alone, with one repeat."""
  return tuple(Group(i, (layer,), 1) for i, layer in enumerate(layers))


def groups(layers: Sequence[LayerConfig]) -> tuple[Group, ...]:
  """Groups layers into repeated patterns, so that each pattern compiles once.

  The first group starts at the first layer. It repeats, at least twice, the shortest pattern that leaves fewer layers
  at the end than the pattern has. If there is no such pattern, the group is all layers, once. The layers that are left
  are grouped in the same way. For example, D D D A D D D A D becomes two repeats of D D D A, and D; D D D A becomes one
  group of four layers, not three repeats of D, and A.

  Raises:
    InputError: There are no layers.
  """
  layers = tuple(layers)
  if not layers:
    raise InputError("layers: the decoder has no layers; give the configuration of at least one layer")
  best = (layers, 1)
  for period in range(1, len(layers) // 2 + 1):
    repeats = len(layers) // period
    if layers[: period * repeats] == layers[:period] * repeats:
      best = (layers[:period], repeats)
      break
  covered = len(best[0]) * best[1]
  head = (Group(0, *best),)
  rest = layers[covered:]
  if not rest:
    return head
  return head + tuple(dataclasses.replace(group, start=group.start + covered) for group in groups(rest))


class DecoderModule(nnx.Module):
  """The modules behind `Decoder`: embedding, groups of stacked layers, final norm and head.

  Args:
    config: Architecture.
    key: Root key of the parameters.
    plan: Division of the layers into groups.
  """

  def __init__(self, config: DecoderConfig, key: Key[Array, ""], *, plan: tuple[Group, ...]):
    init = Init(key)
    self.config, self.plan = config, plan
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
      for g, group in enumerate(plan)
    )
    self.norm = block_norm(init.child("norm"), config=config)
    shape = (config.width, config.vocab_size)
    self.head = None if config.tie_embeddings else Linear(init.child("head"), shape=shape, axes=("embed", "vocab"))

  def readout(self, dtype) -> Readout:
    """Returns the map to logits, with a kernel in `dtype`: the head's or, if tied, the transposed embedding table."""
    kernel = self.embed.table[...].T if self.head is None else self.head.kernel[...]
    return Readout(
      kernel=kernel.astype(dtype),
      softcap=self.config.logit_softcap,
      scale=self.config.logit_scale,
      vocab_size=self.config.vocab_size,
    )

  def embedded(self, tokens, positions, dtype):
    """Returns the embedded tokens [*B,D], float32: scaled embeddings plus learned position embeddings, if any."""
    x, scale = self.embed(tokens), self.config.embed_scale
    if scale != 1.0:
      x = x * (jnp.asarray(scale, dtype).astype(x.dtype) if self.config.round_embed_scale else scale)
    return x if self.positions is None else x + self.positions(positions)

  def __call__(self, tokens, *, segments, positions, capture: Capture, dtype, remat) -> ModelOutput:
    """Runs the decoder on all positions of a batch; returns final hidden states, readout and captured activations.

    Args: as `Decoder.apply`.
    """
    x = constrain(self.embedded(tokens, positions, dtype), ACTIVATIONS)
    # Queries, keys and values are computed after the scan, from the inputs of their layers: the layers of one scan may
    # differ in their widths.
    needed = capture | Capture(layers=tuple(map(before, capture.qkv)))
    # Captured activations live in one array of each kind, [captured layers, B, T, D], which all scans carry and fill.
    layer_outputs, mixer_outputs = (
      constrain(jnp.zeros((len(asked), *x.shape), x.dtype), ("layers", *ACTIVATIONS))
      for asked in (needed.layers, needed.mixers)
    )
    balances = []
    if INPUT in needed.layers:
      layer_outputs = layer_outputs.at[needed.layers.index(INPUT)].set(x)
    for group, layers in zip(self.plan, self.groups, strict=True):
      numbers = [[group.layer(repeat, j) for j in range(len(layers))] for repeat in range(group.repeats)]
      # [repeats, pattern]: a layer's slot is its row in `layer_outputs` or `mixer_outputs`. A layer that is not
      # captured has a slot past the last row, and jax drops what it writes there. If layers 1 and 4 are captured, the
      # slots of layers 0, 1, 2, … are 2 0 2 2 1 2 2 …
      slots = [
        np.asarray([[asked.index(i) if i in asked else len(asked) for i in row] for row in numbers])
        for asked in (needed.layers, needed.mixers)
      ]
      graph, state = nnx.split(layers)

      # One repeat of the group's pattern; the scan below runs it for every repeat.
      def body(carry, xs, graph=graph):
        (x, layer_outputs, mixer_outputs), group_balances = carry, []
        state, (layer_slots, mixer_slots) = xs
        for j, layer in enumerate(nnx.merge(graph, state)):
          added = layer.mix(x, segments=segments, positions=positions, dtype=dtype)
          x = constrain(x + added, ACTIVATIONS)
          balance = layer.balance(x, segments=segments)
          group_balances += [] if balance is None else [balance]
          x = constrain(layer.feed(x, dtype=dtype), ACTIVATIONS)
          layer_outputs = layer_outputs.at[layer_slots[j]].set(x, mode="drop") if needed.layers else layer_outputs
          mixer_outputs = mixer_outputs.at[mixer_slots[j]].set(added, mode="drop") if needed.mixers else mixer_outputs
        return (x, layer_outputs, mixer_outputs), group_balances

      body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
      (x, layer_outputs, mixer_outputs), group_balances = jax.lax.scan(
        body, (x, layer_outputs, mixer_outputs), (state, slots)
      )
      balances += group_balances
    outputs = dict(zip(needed.layers, layer_outputs, strict=True))
    qkv = self.run_isolated(
      [outputs[before(i)] for i in capture.qkv],
      layers=capture.qkv,
      run=functools.partial(Layer.qkv, segments=segments, positions=positions, dtype=dtype),
    )
    return ModelOutput(
      hidden=self.norm(x),
      readout=self.readout(dtype),
      layers={i: outputs[i] for i in capture.layers},
      mixers=dict(zip(needed.mixers, mixer_outputs, strict=True)),
      qkv=dict(zip(capture.qkv, qkv, strict=True)),
      balance=jnp.mean(jnp.concatenate(balances), axis=0) if balances else None,
    )

  def run_isolated(
    self,
    inputs: Sequence[Float[Array, "B T D"]],
    *,
    layers: Sequence[int],
    run: Callable[[Layer, Float[Array, "B T D"]], Any],
  ) -> tuple[Any, ...]:
    """Runs single layers on given inputs, not on each other's outputs.

    Layers that are stacked in one array run in one scan.

    Args:
      inputs: One input for each entry of `layers`.
      layers: Indices of the layers, in any order; a layer may occur several times.
      run: Function (layer, input) -> output; the output is any pytree of arrays.

    Returns:
      The outputs, in the order of `layers`.
    """
    outputs: dict[int, Any] = {}
    for group, stacked in zip(self.plan, self.groups, strict=True):
      for j, layer in enumerate(stacked):
        repeats = {group.layer(repeat, j): repeat for repeat in range(group.repeats)}
        places = [place for place, number in enumerate(layers) if number in repeats]
        if not places:
          continue
        chosen = [repeats[layers[place]] for place in places]
        graph, state = nnx.split(layer)
        if chosen != list(range(group.repeats)):
          state = jax.tree.map(lambda x, chosen=chosen: x[np.asarray(chosen)], state)

        def body(carry, xs, graph=graph):
          return carry, run(nnx.merge(graph, xs[0]), xs[1])

        stack = constrain(jnp.stack([inputs[place] for place in places]), ("layers", *ACTIVATIONS))
        _, out = jax.lax.scan(body, None, (state, stack))
        outputs |= {place: jax.tree.map(operator.itemgetter(i), out) for i, place in enumerate(places)}
    return tuple(outputs[place] for place in range(len(layers)))

  def init_state(self, batch: int, *, length: int, dtype) -> list[list[Any]]:
    """Returns the decoding states of empty rows, states[g][j] for the layers at position j of group g's pattern.

    If the group repeats its pattern, each array in states[g][j] has a leading axis of repeats.

    Args: as `Decoder.init_state`.
    """

    def stacked(layer: Layer, repeats: int):
      state = layer.mixer.init_state(batch, length=length, dtype=layer.mixer_dtype(dtype))
      # A single layer's state is not stacked: the CPU code of XLA (jaxlib 0.10.2) copies an array that is updated in
      # place whenever its shape is cast.
      return state if repeats == 1 else jax.tree.map(lambda x: jnp.broadcast_to(x, (repeats, *x.shape)), state)

    pairs = zip(self.plan, self.groups, strict=True)
    return [[stacked(layer, group.repeats) for layer in layers] for group, layers in pairs]

  def _advance_layers(self, x, states, advance):
    """Runs x, state = advance(layer, x, state) for every layer in turn; returns (x after the last layer, new states).

    Both `states` and the new states are indexed [group][position in the group's pattern], as from `init_state`.
    """
    after = []
    for group, layers, group_states in zip(self.plan, self.groups, states, strict=True):
      graph, params = nnx.split(layers)

      def body(x, xs, graph=graph):
        params, states = xs
        new = []
        for layer, state in zip(nnx.merge(graph, params), states, strict=True):
          x, state = advance(layer, x, state)
          new.append(state)
        return x, new

      if group.repeats > 1:
        x, new = jax.lax.scan(body, x, (params, group_states))
      else:
        x, new = body(x, (jax.tree.map(lambda y: y[0], params), group_states))
      after.append(new)
    return x, after

  def prefill(self, tokens, *, lengths, length, dtype) -> tuple[ModelOutput, list[list[Any]]]:
    """Runs prompts; returns (output, decoding states after the prompts).

    The output is that at the last token of each prompt, so its `hidden` is [B,D]. `lengths` [B] are the numbers of
    tokens in the prompts; `length` is the number of positions that every row may grow to. The states are nested as in
    `init_state`.

    Args: as `Decoder.prefill`.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def advance(layer, x, _):
      return layer.prefill(x, lengths=lengths, length=length, dtype=dtype)

    none = [[None] * len(layers) for layers in self.groups]
    x, states = self._advance_layers(self.embedded(tokens, positions, dtype), none, advance)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return ModelOutput(hidden=self.norm(last), readout=self.readout(dtype)), states

  def step(self, tokens, *, state, positions, dtype) -> tuple[ModelOutput, list[list[Any]]]:
    """Runs the next token of each row; returns (output with `hidden` [B,D], new decoding states).

    The states are nested as in `init_state`.

    Args: as `Decoder.step`.
    """

    def advance(layer, x, state):
      return layer.step(x, state=state, positions=positions, dtype=dtype)

    x, after = self._advance_layers(self.embedded(tokens, positions, dtype), state, advance)
    return ModelOutput(hidden=self.norm(x), readout=self.readout(dtype)), after
