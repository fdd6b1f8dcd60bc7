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

from distill.models.config import DecoderConfig, groups, singles
from distill.models.module import DecoderModule
from distill.parallel.mesh import sharding
from distill.tree import Params, flatten, unflatten
from distill.types import NO_CAPTURE, Capture, ModelOutput


class Decoder:
  """A decoder-only language model as pure functions of flat, named parameters.

  Parameters are *stacked* inside: `groups.{g}.{j}.…` with a leading dimension of repeats. `unstack` gives the
  canonical names `layers.{i}.…`, which do not depend on how layers are grouped, and `stack` takes them back.

  Args:
    config: Architecture.
    scanned: True puts a repeated pattern of layers into one group, which compiles once. False puts every layer into a
      group of its own, which decodes faster: a scan copies every layer's parameters before it computes with them.
  """

  def __init__(self, config: DecoderConfig, *, scanned: bool = True):
    self.config, self._scanned = config, scanned
    self._groups = groups(config.layers) if scanned else singles(config.layers)
    self.graph, self._state = nnx.split(nnx.eval_shape(lambda: self._fresh(jax.random.key(0))))

  def _fresh(self, key: Key[Array, ""]) -> DecoderModule:
    return DecoderModule(self.config, key, plan=self._groups)

  @functools.cached_property
  def unrolled(self) -> "Decoder":
    """The same decoder with every layer in a group of its own; it takes the parameters that `unroll` returns."""
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
    """Returns fresh stacked parameters; jit it with `out_shardings=shardings(mesh)` to make them in place."""
    return flatten(nnx.state(self._fresh(key)))

  def module(self, params: Mapping[str, Any]) -> DecoderModule:
    """Returns the modules with `params` in them, for one pure computation."""
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
      segments: Document of each position; positions see only their own document.
      positions: Position within the document.
      capture: Activations to return beside the final hidden state.
      dtype: Dtype of the operands of projections; sums and the residual stream are float32.
      remat: One of `REMAT_POLICIES`: what the backward pass recomputes.

    Returns:
      The final hidden state [B,T,D], the readout and the captured activations.
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
    """Runs single layers, each on an input of its own, in one scan for each stack of layers.

    Args:
      params: Stacked parameters.
      run: A method of `Layer`: `Layer.mix`, or `Layer.__call__` for the whole layer.
      inputs: One input for each of `layers`.
      layers: Indices of the layers to run.
      segments: Document of each position.
      positions: Position within the document.
      dtype: Dtype of the operands of projections.

    Returns:
      The outputs, in the order of `layers`.
    """
    run = functools.partial(run, segments=segments, positions=positions, dtype=dtype)
    return self.module(params).run_isolated(inputs, layers=layers, run=run)

  def init_state(self, params: Mapping[str, Any], *, batch: int, length: int, dtype: Any = jnp.bfloat16) -> Any:
    """Returns the decoding state of `batch` empty rows that grow to `length` positions.

    Args:
      params: Stacked parameters.
      batch: Number of rows.
      length: Positions that each row grows to.
      dtype: Dtype of KV caches.

    Raises:
      InputError: The model has no embedding for so many positions.
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
    """Runs prompts and returns the output at the last token of each, hidden [B,D], and the decoding state after it.

    Args:
      params: Stacked parameters.
      tokens: Rows padded on the right.
      lengths: Tokens of each row, at least one.
      length: Positions that each row grows to, at least T.
      dtype: Dtype of the operands and of KV caches.

    Raises:
      InputError: The model has no embedding for so many positions.
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
    """Runs the next token of each row; equals `apply` on the whole prefix.

    Args:
      params: Stacked parameters.
      state: The decoding state before the token, stacked like `params`.
      tokens: The next token of each row.
      positions: Position of that token in its document.
      dtype: Dtype of the operands.

    Returns:
      The output, hidden [B,D], and the new decoding state.
    """
    return self.module(params).step(tokens, state=state, positions=positions, dtype=dtype)

  def unroll(self, params: Mapping[str, Any]) -> Params:
    """Converts stacked parameters to those of `unrolled`; call it jitted and once, outside the loop that decodes."""
    return self.unrolled.stack(self.unstack(params)) if self._scanned else dict(params)

  def unroll_state(self, state: Any) -> list[list[Any]]:
    """Converts a decoding state, stacked by groups, to that of `unrolled`: one state for each layer."""
    layers = {}
    for group, states in zip(self._groups, state, strict=True):
      for repeat, (j, one) in itertools.product(range(group.repeats), enumerate(states)):
        layers[group.layer(repeat, j)] = one if group.repeats == 1 else jax.tree.map(operator.itemgetter(repeat), one)
    return [[layers[i]] for i in range(len(layers))]

  def canonical(self, name: str) -> list[str]:
    """Returns the canonical names of a stacked parameter in the order of its layers; other names stay as they are."""
    match = re.match(r"groups\.(\d+)\.(\d+)\.(.*)", name)
    if not match:
      return [name]
    group = self._groups[int(match[1])]
    return [f"layers.{group.layer(repeat, int(match[2]))}.{match[3]}" for repeat in range(group.repeats)]

  def unstack(self, params: Mapping[str, Any]) -> Params:
    """Returns stacked parameters under canonical names; suffixes such as `.lora_a` stay."""
    flat: Params = {}
    for name, value in params.items():
      stacked = name.startswith("groups.")
      flat |= {one: value[i] if stacked else value for i, one in enumerate(self.canonical(name))}
    return flat

  def stack(self, canonical: Mapping[str, Any]) -> Params:
    """Returns canonical parameters under stacked names; layers of one stack must have the same parameters."""
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
