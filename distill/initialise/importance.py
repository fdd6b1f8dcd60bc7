"""Measures how important each layer, head, neuron and channel of a model is, by its activations on rows of text."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from distill.models.config import LayerConfig
from distill.models.decoder import Decoder
from distill.models.layer import Layer
from distill.models.module import groups
from distill.parallel.mesh import batch_sharding, replicated
from distill.tree import Params
from distill.types import Batch

_NORMS = ("mixer_norm", "mixer_post_norm", "mlp_norm", "mlp_post_norm")
_TINY = 1e-30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Importance:
  """Importance of a model's parts by their activations (Muralidharan et al. 2024, 2407.14679; layers: 2403.03853).

  A score of a head, neuron or channel combines activations in two steps: the mean of their absolute values (for heads:
  of their norms) over the tokens of each row, then the L2 norm of these means over all rows.

  Attributes:
    layers: [L] 1 − cos of the angle between a layer's input and its output, averaged over tokens.
    heads: For each layer, [N] scores of the heads' outputs before the output projection; empty without heads.
    neurons: For each layer, [F] scores of the inputs of the MLP's last projection; empty for an MoE layer.
    channels: [D] scores of the inputs of mixers, MLPs and the head, summed over all these inputs.
    shares: For each normalisation layer over the residual stream or over all heads, by its name: an array with one
      entry for each input channel, the channel's share in the mean square of the input, averaged over tokens. The
      shares of a layer sum to one.
    power: For each layer, [N] mean square of each head's output; empty without heads.
    means: For each layer, [D] mean input of its mixer.
  """

  layers: np.ndarray
  heads: tuple[np.ndarray, ...]
  neurons: tuple[np.ndarray, ...]
  channels: np.ndarray
  shares: Mapping[str, np.ndarray]
  power: tuple[np.ndarray, ...]
  means: tuple[np.ndarray, ...]


def measure_importance(
  decoder: Decoder, params: Mapping[str, Any], *, batches: Iterable[Batch], mesh: Mesh
) -> Importance:
  """Runs a model in float32 on all rows of `batches`, and returns the importance of its parts.

  Args:
    decoder: The model.
    params: Its stacked parameters on `mesh`.
    batches: Batches of token rows; padding (segment 0) does not count.
    mesh: Devices that the rows are sharded over.
  """
  sums = jax.jit(
    lambda params, batch: _sums(decoder, params, batch),
    in_shardings=(decoder.shardings(mesh), batch_sharding(mesh)),
    out_shardings=replicated(mesh),
  )
  total: Params = {}
  for batch in batches:
    for name, value in jax.device_get(sums(dict(params), batch)).items():
      total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)
  return _importance(decoder, total)


def _importance(decoder: Decoder, stacked: Params) -> Importance:
  count = np.maximum(stacked.pop("count"), 1.0)
  total = decoder.unstack(stacked)
  depth = len(decoder.config.layers)

  def per_layer(name: str, finish: Callable[[Any], Any]) -> tuple[np.ndarray, ...]:
    found = (total.get(f"layers.{i}.{name}") for i in range(depth))
    return tuple(np.zeros(0) if x is None else np.asarray(finish(x)) for x in found)

  read = [x for name, x in total.items() if name.endswith("read")]
  return Importance(
    layers=np.asarray(per_layer("change", lambda x: x / count)),
    heads=per_layer("heads", np.sqrt),
    neurons=per_layer("neurons", np.sqrt),
    channels=np.sum(np.sqrt(read), axis=0),
    shares={name.removesuffix(".share"): x / count for name, x in total.items() if name.endswith(".share")},
    power=per_layer("power", lambda x: x / count),
    means=per_layer("mean", lambda x: x / count),
  )


class _Tap:
  """Stands in for a module: calls the module and records its last input as `seen`."""

  def __init__(self, module: Any):
    self._module = module
    self.seen: Any = None

  def __call__(self, x, **rest):
    self.seen = x
    return self._module(x, **rest)


def _tap(parent: object, name: str) -> _Tap | None:
  """Replaces the child `name` of `parent` by a `_Tap`, which records its input.

  Returns the `_Tap`, or None without such a child.
  """
  module = getattr(parent, name, None)
  if module is None:
    return None
  tap = _Tap(module)
  object.__setattr__(parent, name, tap)
  return tap


def _sums(decoder: Decoder, params: Mapping[str, Any], batch: Batch) -> Params:
  """Returns the sums over one batch from which `measure_importance` computes an `Importance`: name -> sum.

  Statistics of layers are named like stacked parameters (`groups.0.0.heads`), and hold the layers on their first axis.
  """
  config, module = decoder.config, decoder.module(params)
  valid = (batch.segments > 0).astype(jnp.float32)
  found: Params = {"count": jnp.sum(valid)}
  x = module.embedded(batch.tokens, batch.positions, jnp.float32)
  for g, (group, layers) in enumerate(zip(groups(config.layers), module.groups, strict=True)):
    graph, state = nnx.split(layers)

    def body(x, state, graph=graph, group=group):
      sums = []
      for spec, layer in zip(group.pattern, nnx.merge(graph, state), strict=True):
        x, one = _observe(layer, x, spec=spec, batch=batch, valid=valid, centred=config.norm == "layer")
        sums.append(one)
      return x, sums

    x, sums = jax.lax.scan(body, x, state)
    found |= {f"groups.{g}.{j}.{name}": value for j, one in enumerate(sums) for name, value in one.items()}
  final = _tap(module, "norm")
  assert final is not None
  found["read"] = _by_row(jnp.abs(module.norm(x)), valid)
  return found | {"norm.share": _share(final.seen, valid, centred=config.norm == "layer")}


def _observe(
  layer: Layer, x, *, spec: LayerConfig, batch: Batch, valid: Float[Array, "B T"], centred: bool
) -> tuple[Float[Array, "B T D"], Params]:
  """Runs a layer and sums importance statistics of its activations over the batch.

  Args:
    layer: The layer; each module whose input is needed is replaced by a `_Tap`, which records it.
    x: Input of the layer [B, T, D].
    spec: Configuration of the layer.
    batch: The batch.
    valid: 1 for tokens, 0 for padding.
    centred: True if the norms of the residual stream subtract the mean (LayerNorm).

  Returns:
    (output of the layer, name of a statistic -> its sum).
  """
  norms = {name: tap for name in _NORMS if (tap := _tap(layer, name)) is not None}
  inner = {}
  if getattr(spec.mixer, "qk_norm", None) == "full":
    inner = {name: tap for name in ("q_norm", "k_norm") if (tap := _tap(layer.mixer, name)) is not None}
  out = _tap(layer.mixer, "o")
  neurons = _tap(layer.mlp, "down")
  readers = [tap for name in ("mixer", "mlp") if (tap := _tap(layer, name)) is not None]
  y = layer(x, segments=batch.segments, positions=batch.positions, dtype=jnp.float32)
  sums = {
    "change": jnp.sum(valid * (1.0 - _cosine(x, y))),
    "mean": jnp.einsum("bt,btd->d", valid, readers[0].seen),
  }
  shape = spec.mixer.head_shape
  if out is not None and shape is not None:
    heads = out.seen.astype(jnp.float32).reshape(*valid.shape, shape.heads, -1)
    sums["heads"] = _by_row(jnp.linalg.norm(heads, axis=-1), valid)
    sums["power"] = jnp.einsum("bt,btn->n", valid, jnp.mean(jnp.square(heads), axis=-1))
  if neurons is not None:
    sums["neurons"] = _by_row(jnp.abs(neurons.seen.astype(jnp.float32)), valid)
  sums |= {f"{name}.share": _share(tap.seen, valid, centred=centred) for name, tap in norms.items()}
  sums |= {f"mixer.{name}.share": _share(tap.seen, valid, centred=False) for name, tap in inner.items()}
  sums |= {f"{i}.read": _by_row(jnp.abs(tap.seen), valid) for i, tap in enumerate(readers)}
  return y, sums


def _cosine(x, y):
  product = jnp.sum(x * y, axis=-1)
  return product * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1) * jnp.sum(y * y, axis=-1), _TINY))


def _by_row(size: Float[Array, "B T F"], valid: Float[Array, "B T"]) -> Float[Array, " F"]:
  """Averages the magnitudes `size` over each row's valid tokens, squares these means and sums them over rows."""
  count = jnp.maximum(jnp.sum(valid, axis=1), 1.0)
  return jnp.sum(jnp.square(jnp.einsum("bt,btf->bf", valid, size) / count[:, None]), axis=0)


def _share(x: Float[Array, "B T F"], valid: Float[Array, "B T"], *, centred: bool) -> Float[Array, " F"]:
  """Returns each input's share in a token's sum of squares, summed over valid tokens; `centred` subtracts the mean."""
  x = x - jnp.mean(x, axis=-1, keepdims=True) if centred else x
  squares = jnp.square(x)
  return jnp.einsum("bt,btf->f", valid, squares / jnp.maximum(jnp.sum(squares, axis=-1, keepdims=True), _TINY))
