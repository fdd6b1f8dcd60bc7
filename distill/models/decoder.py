"""A decoder-only language model as pure functions of named parameters."""

import functools
import itertools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, Key

from distill.models.config import DecoderConfig
from distill.models.module import DecoderModule, groups, singles
from distill.parallel.mesh import sharding
from distill.tree import Params, flatten, unflatten
from distill.types import NO_CAPTURE, Capture, ModelOutput


class Decoder:
  """A decoder-only language model as pure functions of flat, named parameters.

  The layers are divided into groups, each of which repeats a pattern of layers. The methods take *stacked* parameters:
  `groups.{g}.{j}.…` is an array with a leading dimension of repeats. It holds the parameters of the layers at position
  j of group g's pattern. `unstack` converts stacked parameters to canonical names `layers.{i}.…`, which do not depend
  on how layers are grouped, and `stack` converts them back.

  Args:
    config: Architecture.
    scanned: True puts a repeated pattern of layers into one group, which is scanned and compiles once. False puts
      every layer into a group of its own. That decodes faster, because a scan copies the parameters of every layer.
  """

  def __init__(self, config: DecoderConfig, *, scanned: bool = True):
    self.config, self._scanned = config, scanned
    self._groups = groups(config.layers) if scanned else singles(config.layers)
    self.graph, self._state = nnx.split(nnx.eval_shape(lambda: self._fresh(jax.random.key(0))))

  def _fresh(self, key: Key[Array, ""]) -> DecoderModule:
    return DecoderModule(self.config, key, plan=self._groups)

  @functools.cached_property
  def unrolled(self) -> "Decoder":
    """The same decoder with every layer in a group of its own, which decodes faster.

    Its methods take parameters from `unroll` and decoding states from `unroll_state`.
    """
    return Decoder(self.config, scanned=False) if self._scanned else self

  def abstract(self) -> Params:
    """Returns the shape and dtype of every stacked parameter."""
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in flatten(self._state).items()}

  def axes(self) -> dict[str, tuple[str | None, ...]]:
    """Returns the logical axes of every stacked parameter."""
    flat = nnx.to_flat_state(self._state)
    return {".".join(map(str, path)): variable.get_metadata()["axes"] for path, variable in flat}

  def shardings(self, mesh: Mesh) -> dict[str, NamedSharding]:
    """Returns the sharding of every stacked parameter on `mesh`."""
    axes = self.axes()
    return {name: sharding(mesh, x.shape, axes[name]) for name, x in self.abstract().items()}

  def init(self, key: Key[Array, ""]) -> Params:
    """Returns fresh stacked parameters.

    Jit this method with `out_shardings=shardings(mesh)` to create each shard on its own device.
    """
    return flatten(nnx.state(self._fresh(key)))

  def module(self, params: Mapping[str, Any]) -> DecoderModule:
    """Returns the flax module with the stacked parameters `params`.

    In a function that JAX traces, the module holds tracers, so it must not be used outside that function.
    """
    return nnx.merge(self.graph, unflatten(self._state, params))

  def apply(
    self,
    params: Mapping[str, Any],
    *,
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    capture: Capture = NO_CAPTURE,
    dtype: Any = jnp.bfloat16,
    remat: str = "projections",
  ) -> ModelOutput:
    """Runs the decoder end to end.

    Args:
      params: Stacked parameters.
      tokens: Token ids.
      segments: Number of each position's document within its row; positions see only their own document.
      positions: Position within the document, from 0.
      capture: Activations to return in addition to the final hidden state.
      dtype: Dtype of the operands of projections; sums and the residual stream are float32.
      remat: One of `REMAT_POLICIES`, which decides what the backward pass recomputes.

    Returns:
      The final hidden state [B,T,D], the readout that turns it into logits, and the captured activations.
    """
    return self.module(params)(
      tokens,
      segments=segments,
      positions=positions,
      capture=capture,
      dtype=dtype,
      remat=remat,
    )

  def run_isolated(
    self,
    params: Mapping[str, Any],
    *,
    run: Callable[..., Any],
    inputs: Sequence[Float[Array, "B T D"]],
    layers: Sequence[int],
    segments: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    dtype: Any = jnp.bfloat16,
  ) -> tuple[Any, ...]:
    """Runs single layers, each on an input of its own; layers stacked in one array run in one scan.

    Args:
      params: Stacked parameters.
      run: The method of `Layer` to run: `Layer.mix`, or `Layer.__call__` for the whole layer.
      inputs: Residual stream before each of `layers`.
      layers: Indices of the layers to run.
      segments: Number of each position's document within its row.
      positions: Position within the document, from 0.
      dtype: Dtype of the operands of projections.

    Returns:
      What `run` returns for each of `layers`, in their order; [B,T,D] each for the two methods above.
    """
    run = functools.partial(run, segments=segments, positions=positions, dtype=dtype)
    return self.module(params).run_isolated(inputs, layers=layers, run=run)

  def init_state(self, params: Mapping[str, Any], *, batch: int, length: int, dtype: Any = jnp.bfloat16) -> Any:
    """Returns the decoding state of `batch` empty rows, from which `step` starts.

    Args:
      params: Stacked parameters.
      batch: Number of rows.
      length: Number of positions that each row may grow to.
      dtype: Dtype of KV caches.

    Raises:
      InputError: The model has learned positions, but fewer than `length`.
    """
    self.config.check_length(length, what="prompt and text to draw")
    return self.module(params).init_state(batch, length=length, dtype=dtype)

  def prefill(
    self,
    params: Mapping[str, Any],
    *,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    length: int,
    dtype: Any = jnp.bfloat16,
  ) -> tuple[ModelOutput, Any]:
    """Runs prompts; returns (output, decoding state after the prompts).

    The output is that at the last token of each prompt, so its `hidden` is [B,D].

    Args:
      params: Stacked parameters.
      tokens: Token ids of the prompts, padded on the right.
      lengths: Number of tokens of each prompt, at least one.
      length: Capacity of the decoding state: the largest number of positions that a row, prompt and continuation
        together, can have; at least T.
      dtype: Dtype of the operands of projections and of KV caches.

    Raises:
      InputError: The model has learned positions, but fewer than `length`.
    """
    self.config.check_length(length, what="prompt and text to draw")
    return self.module(params).prefill(tokens, lengths=lengths, length=length, dtype=dtype)

  def step(
    self,
    params: Mapping[str, Any],
    *,
    state: Any,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    dtype: Any = jnp.bfloat16,
  ) -> tuple[ModelOutput, Any]:
    """Runs the next token of each row. The output equals that of `apply` on the whole row at this token.

    Args:
      params: Stacked parameters.
      state: The decoding state before the token, stacked like `params`.
      tokens: Id of the next token of each row.
      positions: Position of that token in its document, from 0.
      dtype: Dtype of the operands of projections.

    Returns:
      (output with `hidden` [B,D], new decoding state).
    """
    return self.module(params).step(tokens, state=state, positions=positions, dtype=dtype)

  def unroll(self, params: Mapping[str, Any]) -> Params:
    """Returns stacked parameters split by layer, as the methods of `self.unrolled` take them.

    Call this once under jit, outside the decoding loop.
    """
    return self.unrolled.stack(self.unstack(params)) if self._scanned else dict(params)

  def unroll_state(self, state: Any) -> list[list[Any]]:
    """Returns a decoding state split by layer, as `self.unrolled.step` takes it.

    Args:
      state: The decoding state that `prefill` or `step` of this decoder returned.

    Returns:
      [[state of layer 0], [state of layer 1], …]: one list for each group of `self.unrolled`, and each group is one
      layer.
    """
    layers = {}
    for group, states in zip(self._groups, state, strict=True):
      for repeat, (j, one) in itertools.product(range(group.repeats), enumerate(states)):
        layers[group.layer(repeat, j)] = one if group.repeats == 1 else jax.tree.map(operator.itemgetter(repeat), one)
    return [[layers[i]] for i in range(len(layers))]

  def canonical(self, name: str) -> list[str]:
    """Returns the canonical names of a stacked parameter, in the order of its layers.

    A parameter that is not stacked, such as `embed.table`, has one canonical name: its own.
    """
    match = re.match(r"groups\.(\d+)\.(\d+)\.(.*)", name)
    if not match:
      return [name]
    group = self._groups[int(match[1])]
    return [f"layers.{group.layer(repeat, int(match[2]))}.{match[3]}" for repeat in range(group.repeats)]

  def unstack(self, params: Mapping[str, Any]) -> Params:
    """Splits stacked parameters into layers under canonical names; a suffix such as `.lora_a` stays in the name."""
    flat: Params = {}
    for name, value in params.items():
      stacked = name.startswith("groups.")
      flat |= {one: value[i] if stacked else value for i, one in enumerate(self.canonical(name))}
    return flat

  def stack(self, canonical: Mapping[str, Any]) -> Params:
    """Returns stacked parameters from canonical ones; layers that become one array must have equal parameter names."""
    slots = {
      group.layer(repeat, j): (f"groups.{g}.{j}", repeat)
      for g, group in enumerate(self._groups)
      for j in range(len(group.pattern))
      for repeat in range(group.repeats)
    }
    stacked: Params = {}
    by_repeat: dict[str, dict[int, Any]] = {}
    for name, value in canonical.items():
      match = re.match(r"layers\.(\d+)\.(.*)", name)
      if not match:
        stacked[name] = value
        continue
      prefix, repeat = slots[int(match[1])]
      by_repeat.setdefault(f"{prefix}.{match[2]}", {})[repeat] = value
    for name, values in by_repeat.items():
      ordered = [values[repeat] for repeat in range(len(values))]
      stack = jnp.stack if isinstance(ordered[0], jax.Array) else np.stack
      stacked[name] = stack(ordered)
    return stacked
