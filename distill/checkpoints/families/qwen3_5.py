"""Qwen 3.5, text only: gated delta rule and gated attention."""

from collections.abc import Mapping
from typing import Any

from distill.checkpoints.attributes import Attributes
from distill.checkpoints.families.common import attention, decoder, dense, frame, fused, heads, linear, mlp, norms
from distill.checkpoints.families.ropes import read_rope, write_rope
from distill.checkpoints.family import Family
from distill.checkpoints.name_table import TensorEntry
from distill.errors import InputError
from distill.models.config import DecoderConfig, LayerConfig
from distill.nn.attention import AttentionConfig
from distill.nn.gated_delta import GatedDeltaConfig
from distill.nn.mlp import MlpConfig

# Multi-token prediction layers, which transformers does not load either.
IGNORED_TENSORS = r"mtp\."
_KINDS = ("linear_attention", "full_attention")


def read(values: Mapping[str, Any], *, where: str) -> DecoderConfig:
  """Returns the decoder configuration that the keys of a config.json describe.

  Raises:
    InputError: A key is missing, unknown or not supported; the message begins with `where`, the file's name.
  """
  have = Attributes(values, where=where)
  mixers = hybrid(have, kv=4)
  mlp = MlpConfig(width=have.integer("intermediate_size"))
  return decoder(have, family="qwen3_5_text", layers=[LayerConfig(mixer=x, mlp=mlp) for x in mixers], norm_offset=1.0)


def hybrid(have: Attributes, *, kv: int) -> list[AttentionConfig | GatedDeltaConfig]:
  """Returns the configuration of each layer's mixer, which is the gated delta rule or gated attention.

  Args:
    have: The keys of config.json.
    kv: The family's default for the number of key heads.

  Raises:
    InputError: A key is missing or not supported.
  """
  count, every = have.integer("num_hidden_layers"), have.integer("full_attention_interval", 4)
  kinds = have.one_a_layer("layer_types", [_KINDS[(i + 1) % every == 0] for i in range(count)], allowed=_KINDS)
  sizes, bias = heads(have, kv=kv, head_dim=256), have.flag("attention_bias")
  full = AttentionConfig(
    **sizes,
    rope=read_rope(have, head_dim=sizes["head_dim"], partial=True, fraction=0.25),
    gated=True,
    qk_norm="head",
    use_bias=bias,
    use_out_bias=bias,
  )
  delta = GatedDeltaConfig(
    num_key_heads=have.integer("linear_num_key_heads", 16),
    num_value_heads=have.integer("linear_num_value_heads", 32),
    key_head_dim=have.integer("linear_key_head_dim", 128),
    value_head_dim=have.integer("linear_value_head_dim", 128),
    conv_width=have.integer("linear_conv_kernel_dim", 4),
  )
  if delta.num_value_heads % delta.num_key_heads:
    raise InputError(
      f"{have.where}: linear_num_key_heads {delta.num_key_heads} does not divide linear_num_value_heads "
      f"{delta.num_value_heads}; correct one of them"
    )
  have.only("hidden_act", ("silu",))
  return [full if kind == "full_attention" else delta for kind in kinds]


def write(config: DecoderConfig) -> dict[str, Any]:
  """Returns the keys of config.json that describe a decoder; the inverse of `read`.

  Raises:
    InputError: All layers have the same type of attention, which config.json cannot express.
  """
  return {**written_hybrid(config), "intermediate_size": dense(config).width}


def written_hybrid(config: DecoderConfig) -> dict[str, Any]:
  """Returns the keys of config.json that describe a decoder, except those of the MLPs.

  Raises:
    InputError: All layers have the same type, which config.json cannot express.
  """
  full = next((x.mixer for x in config.layers if isinstance(x.mixer, AttentionConfig)), None)
  delta = next((x.mixer for x in config.layers if isinstance(x.mixer, GatedDeltaConfig)), None)
  if full is None or full.rope is None or delta is None:
    have, lack = ("full", "linear") if delta is None else ("linear", "full")
    raise InputError(
      f"all layers are {have} attention; set full_attention_interval (4 unless given) "
      f"or layer_types so that at least one layer is {lack}_attention"
    )
  return {
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "num_hidden_layers": len(config.layers),
    "layer_types": [_KINDS[isinstance(layer.mixer, AttentionConfig)] for layer in config.layers],
    "num_attention_heads": full.num_heads,
    "num_key_value_heads": full.num_kv_heads,
    "head_dim": full.head_dim,
    "linear_num_key_heads": delta.num_key_heads,
    "linear_num_value_heads": delta.num_value_heads,
    "linear_key_head_dim": delta.key_head_dim,
    "linear_value_head_dim": delta.value_head_dim,
    "linear_conv_kernel_dim": delta.conv_width,
    "hidden_act": "silu",
    "max_position_embeddings": config.max_positions,
    "rms_norm_eps": config.norm_eps,
    "rope_parameters": {**write_rope(full.rope), "partial_rotary_factor": full.rope.fraction},
    "attention_bias": full.use_bias,
    "tie_word_embeddings": config.tie_embeddings,
  }


def table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
  """Returns the name table: the tensors of a checkpoint, with the parameters that they hold."""
  rows = frame(config)
  for index, layer in enumerate(config.layers):
    assert isinstance(layer.mlp, MlpConfig), layer.mlp
    rows += [*norms(index, config=config), *mlp(index, spec=layer.mlp)]
    if isinstance(layer.mixer, AttentionConfig):
      rows += attention(index, spec=layer.mixer)
    elif isinstance(layer.mixer, GatedDeltaConfig):
      rows += delta(index, spec=layer.mixer)
  return tuple(rows)


def delta(index: int, *, spec: GatedDeltaConfig, interleaved: bool = False) -> list[TensorEntry]:
  """Returns the name-table entries (parameter, tensor) of one gated delta layer.

  Args:
    index: Index of the layer, from 0.
    spec: The mixer of the layer.
    interleaved: True if the checkpoint has q, k, v, z in one tensor and b, a in another, each grouped by key head.
      False if q, k, v are concatenated in one tensor and z, b, a have a tensor each.
  """
  ours, theirs = f"layers.{index}.mixer", f"model.layers.{index}.linear_attn"
  groups, served = spec.num_key_heads, spec.num_value_heads // spec.num_key_heads
  one = {"q": spec.key_head_dim, "k": spec.key_head_dim, "v": served * spec.value_head_dim}
  every, kernels = {name: groups * size for name, size in one.items()}, f"{ours}.{{}}.kernel"
  if interleaved:
    rows = fused({**one, "z": one["v"]}, ours=kernels, theirs=f"{theirs}.in_proj_qkvz.weight", grouped=True)
    rows += fused({"b": served, "a": served}, ours=kernels, theirs=f"{theirs}.in_proj_ba.weight", grouped=True)
  else:
    rows = fused(every, ours=kernels, theirs=f"{theirs}.in_proj_qkv.weight")
    rows += [row for name in "zba" for row in linear(f"{ours}.{name}", f"{theirs}.in_proj_{name}")]
  return [
    *rows,
    *fused(every, ours=f"{ours}.conv.{{}}.kernel", theirs=f"{theirs}.conv1d.weight", form="conv"),
    TensorEntry(f"{ours}.dt_bias", f"{theirs}.dt_bias"),
    TensorEntry(f"{ours}.a_log", f"{theirs}.A_log"),
    TensorEntry(f"{ours}.norm.scale", f"{theirs}.norm.weight"),
    *linear(f"{ours}.o", f"{theirs}.out_proj"),
  ]


FAMILY = Family(
  name="qwen3_5_text",
  architecture="Qwen3_5ForCausalLM",
  read=read,
  write=write,
  table=table,
  ignored_tensors=IGNORED_TENSORS,
)
