"""Functions that the families share: they read and write parts of config.json and make parts of the name tables.

A name table says which tensor of a checkpoint holds which canonical parameter; each entry is one such pair.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from distill.checkpoints.attributes import Attributes
from distill.checkpoints.families.ropes import write_rope
from distill.checkpoints.name_table import Part, TensorEntry
from distill.errors import InputError
from distill.models.config import DecoderConfig, LayerConfig
from distill.nn.attention import AttentionConfig
from distill.nn.mlp import MlpConfig
from distill.nn.moe import MoeConfig
from distill.nn.rope import RopeConfig

SLIDING, FULL = "sliding_attention", "full_attention"


def heads(have: Attributes, *, kv: int | None = None, head_dim: int | None = None) -> dict[str, Any]:
  """Returns `num_heads`, `num_kv_heads` and `head_dim` of `AttentionConfig`, read from config.json.

  Args:
    have: The keys of config.json.
    kv: The family's default for the number of key heads; None means the number of query heads.
    head_dim: The family's default for the width of a head; None means the model's width divided by the query heads.

  Raises:
    InputError: The number of key heads does not divide the number of query heads.
  """
  width, count = have.integer("hidden_size"), have.integer("num_attention_heads")
  kv = have.integer("num_key_value_heads", kv or count)
  if count % kv:
    raise InputError(
      f"{have.where}: num_key_value_heads {kv} does not divide num_attention_heads {count}; correct one of them"
    )
  size = have.integer("head_dim", head_dim or max(width // count, 1))
  return {"num_heads": count, "num_kv_heads": kv, "head_dim": size}


def window(have: Attributes, default: int | None = None) -> int | None:
  """Returns the key `sliding_window` of config.json, in tokens; None if it is null, `default` if it is absent."""
  if have.get("sliding_window") is None and (default is None or have.has("sliding_window")):
    return None
  return have.integer("sliding_window", default)


def layer_windows(have: Attributes, default: Sequence[str], *, size: int | None) -> tuple[int | None, ...]:
  """Returns the attention window of each layer, as its entry in `layer_types` says: `size` if sliding, None if full.

  Args:
    have: The keys of config.json.
    default: The list if `layer_types` is absent.
    size: Window of the sliding layers, in tokens.

  Raises:
    InputError: A layer is sliding, but `size` is None.
  """
  kinds = have.one_a_layer("layer_types", default, allowed=(SLIDING, FULL))
  if SLIDING in kinds and size is None:
    raise InputError(f"{have.where}: layer_types has {SLIDING} but sliding_window is missing; add sliding_window")
  return tuple(size if kind == SLIDING else None for kind in kinds)


def windowed(
  have: Attributes,
  default: Sequence[str],
  *,
  size: int | None,
  mixer: AttentionConfig,
  mlp: MlpConfig | MoeConfig,
  local: RopeConfig | None = None,
) -> list[LayerConfig]:
  """Returns the layers of a model with sliding-window and full attention; `layer_types` says which layer has which.

  Args:
    have: The keys of config.json.
    default: Type of each layer if `layer_types` is absent.
    size: Window of the sliding layers, in tokens.
    mixer: Attention of the full layers.
    mlp: MLP of all layers.
    local: Rotary embedding of the sliding layers; by default that of `mixer`.

  Raises:
    InputError: A layer is sliding, but `size` is None.
  """
  sliding = dataclasses.replace(mixer, window=size, rope=local or mixer.rope)
  windows = layer_windows(have, default, size=size)
  return [LayerConfig(mixer=mixer if one is None else sliding, mlp=mlp) for one in windows]


def decoder(
  have: Attributes, *, family: str, layers: Sequence[LayerConfig], norm_eps: float = 1e-6, tied: bool = False, **changes
) -> DecoderConfig:
  """Builds the decoder's configuration from the keys that all families share, then refuses keys that nothing has read.

  Args:
    have: The keys of config.json; the family has already read the keys that only it uses.
    family: Name of the family.
    layers: The layers.
    norm_eps: The family's default for `rms_norm_eps`.
    tied: The family's default for `tie_word_embeddings`.
    **changes: Further fields of `DecoderConfig`.

  Raises:
    InputError: A key is missing, has a wrong value, or was not read.
  """
  config = DecoderConfig(
    family=family,
    vocab_size=have.integer("vocab_size"),
    width=have.integer("hidden_size"),
    layers=tuple(layers),
    norm_eps=have.epsilon("rms_norm_eps", norm_eps),
    tie_embeddings=have.flag("tie_word_embeddings", tied),
    max_positions=have.integer("max_position_embeddings", 2048),
    **changes,
  )
  have.ignore("original_max_position_embeddings")
  have.finish()
  return config


def mixers(config: DecoderConfig) -> list[AttentionConfig]:
  """Returns the attention configuration of every layer, and asserts that every layer has attention."""
  found = [layer.mixer for layer in config.layers if isinstance(layer.mixer, AttentionConfig)]
  assert len(found) == len(config.layers), config.family
  return found


def dense(config: DecoderConfig) -> MlpConfig:
  """Returns the configuration of the dense MLP, which is the same in all layers that have one."""
  return next(layer.mlp for layer in config.layers if isinstance(layer.mlp, MlpConfig))


def written(config: DecoderConfig) -> dict[str, Any]:
  """Returns the keys of config.json that are common to most families with attention in every layer."""
  mixer, mlp = mixers(config)[0], config.layers[0].mlp
  assert mlp is not None, config.family
  ropes = [x.rope for x in mixers(config) if x.rope is not None]
  rope = {"rope_parameters": write_rope(ropes[0])} if ropes else {}
  return {
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "intermediate_size": mlp.width,
    "num_hidden_layers": len(config.layers),
    "num_attention_heads": mixer.num_heads,
    "num_key_value_heads": mixer.num_kv_heads,
    "head_dim": mixer.head_dim,
    "hidden_act": mlp.act,
    "max_position_embeddings": config.max_positions,
    "rms_norm_eps": config.norm_eps,
    "tie_word_embeddings": config.tie_embeddings,
    **rope,
  }


def written_windows(config: DecoderConfig) -> dict[str, Any]:
  """Returns the keys `layer_types` and `sliding_window` of config.json."""
  windows = [mixer.window for mixer in mixers(config)]
  size = next((x for x in windows if x is not None), None)
  return {"layer_types": [FULL if x is None else SLIDING for x in windows], "sliding_window": size}


def written_ropes(layers: Sequence[AttentionConfig]) -> dict[str, Any]:
  """Returns the value of `rope_parameters` in config.json: one object for each attention type that `layers` have."""
  ropes = {FULL if x.window is None else SLIDING: x.rope for x in layers}
  return {kind: write_rope(rope) for kind, rope in ropes.items() if rope is not None}


def linear(ours: str, theirs: str, *, bias: bool = False) -> list[TensorEntry]:
  """Returns the name-table entries (parameter, tensor) of one linear projection: its kernel and, with `bias`, its bias.

  Args:
    ours: Canonical name of the projection, without `.kernel` or `.bias`.
    theirs: Name of the projection in the checkpoint, without `.weight` or `.bias`.
    bias: True if the projection has a bias.
  """
  kernel = TensorEntry(f"{ours}.kernel", f"{theirs}.weight", "transpose")
  return [kernel, TensorEntry(f"{ours}.bias", f"{theirs}.bias")] if bias else [kernel]


def fused(
  sizes: Mapping[str, int], *, ours: str, theirs: str, form: str = "transpose", grouped: bool = False
) -> list[TensorEntry]:
  """Returns the name-table entries (parameter, tensor) of parameters that are concatenated in one tensor.

  Args:
    sizes: String that replaces {} in `ours` -> number of columns of this parameter (in one group, if `grouped`).
    ours: The canonical names, with {} in place of the part that differs.
    theirs: Name of the tensor.
    form: How the tensor is stored; a value of `TensorEntry.form`.
    grouped: True if the tensor is a sequence of groups, each with columns of all parameters.
  """
  rows, start, period = [], 0, sum(sizes.values()) if grouped else None
  for name, size in sizes.items():
    rows.append(TensorEntry(ours.format(name), theirs, form, part=Part(start, start + size, period)))
    start += size
  return rows


def frame(config: DecoderConfig) -> list[TensorEntry]:
  """Returns the name-table entries (parameter, tensor) of embedding, final norm and, unless it is tied, head."""
  rows = [TensorEntry("embed.table", "model.embed_tokens.weight"), TensorEntry("norm.scale", "model.norm.weight")]
  return rows if config.tie_embeddings else [*rows, *linear("head", "lm_head")]


_NORMS = {
  "pre": (("mixer_norm", "input"), ("mlp_norm", "post_attention")),
  "post": (("mixer_post_norm", "post_attention"), ("mlp_post_norm", "post_feedforward")),
  "both": (
    ("mixer_norm", "input"),
    ("mixer_post_norm", "post_attention"),
    ("mlp_norm", "pre_feedforward"),
    ("mlp_post_norm", "post_feedforward"),
  ),
}


def norms(index: int, *, config: DecoderConfig) -> list[TensorEntry]:
  """Returns the name-table entries (parameter, tensor) of the norms around the mixer and the MLP of one layer."""
  return [
    TensorEntry(f"layers.{index}.{ours}.scale", f"model.layers.{index}.{theirs}_layernorm.weight")
    for ours, theirs in _NORMS[config.norms]
  ]


def mlp(index: int, *, spec: MlpConfig) -> list[TensorEntry]:
  """Returns the name-table entries (parameter, tensor) of the gated MLP of one layer."""
  ours, theirs = f"layers.{index}.mlp", f"model.layers.{index}.mlp"
  names = ("gate", "up", "down")
  return [row for x in names for row in linear(f"{ours}.{x}", f"{theirs}.{x}_proj", bias=spec.use_bias)]


def experts(index: int, *, spec: MoeConfig, block: str, names: dict[str, str]) -> list[TensorEntry]:
  """Returns the name-table entries (parameter, tensor) of a router and of experts that are separate tensors.

  Args:
    index: Index of the layer, from 0.
    spec: The mixture of experts of the layer.
    block: Name of the MoE block within the layer of the checkpoint.
    names: Our name of a projection -> its name in the checkpoint.
  """
  ours, theirs = f"layers.{index}.mlp", f"model.layers.{index}.{block}"
  rows = linear(f"{ours}.router", f"{theirs}.gate")
  for expert in range(spec.num_experts):
    rows += [
      TensorEntry(f"{ours}.experts.{x}.kernel", f"{theirs}.experts.{expert}.{y}.weight", "transpose", expert=expert)
      for x, y in names.items()
    ]
  return rows


def attention(index: int, *, spec: AttentionConfig) -> list[TensorEntry]:
  """Returns the name-table entries (parameter, tensor) of one attention layer."""
  ours, theirs = f"layers.{index}.mixer", f"model.layers.{index}.self_attn"
  rows = [row for name in "qkv" for row in linear(f"{ours}.{name}", f"{theirs}.{name}_proj", bias=spec.use_bias)]
  rows += linear(f"{ours}.o", f"{theirs}.o_proj", bias=spec.use_out_bias)
  if spec.qk_norm:
    rows += [TensorEntry(f"{ours}.{name}_norm.scale", f"{theirs}.{name}_norm.weight") for name in "qk"]
  return [*rows, TensorEntry(f"{ours}.sinks", f"{theirs}.sinks")] if spec.sinks else rows


def dense_table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
  """Returns the name table of a model of attention and gated MLPs whose tensors are named like those of Llama."""
  rows = frame(config)
  for index, (layer, mixer) in enumerate(zip(config.layers, mixers(config), strict=True)):
    assert isinstance(layer.mlp, MlpConfig), layer.mlp
    rows += [*norms(index, config=config), *attention(index, spec=mixer), *mlp(index, spec=layer.mlp)]
  return tuple(rows)
