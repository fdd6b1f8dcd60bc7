"""Qwen 3 with mixtures of experts, on all layers or on some."""

from collections.abc import Mapping
from typing import Any

from distill.checkpoints.attributes import Attributes
from distill.checkpoints.families.common import (
  attention,
  decoder,
  experts,
  frame,
  heads,
  linear,
  mixers,
  mlp,
  norms,
  written,
)
from distill.checkpoints.families.qwen2 import switched_window
from distill.checkpoints.families.ropes import read_rope
from distill.checkpoints.family import Family
from distill.checkpoints.name_table import TensorEntry
from distill.errors import InputError
from distill.models.config import DecoderConfig, LayerConfig
from distill.nn.attention import AttentionConfig
from distill.nn.mlp import MlpConfig
from distill.nn.moe import MoeConfig

_NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def read(values: Mapping[str, Any], *, where: str) -> DecoderConfig:
  """Returns the decoder configuration that the keys of a config.json describe.

  Raises:
    InputError: A key is missing, unknown or not supported; the message begins with `where`, the file's name.
  """
  have = Attributes(values, where=where)
  sizes, bias, act = heads(have, kv=4), have.flag("attention_bias"), have.activation()
  # transformers gives every layer the window, and does not read this key.
  have.ignore("max_window_layers")
  mixer = AttentionConfig(
    **sizes,
    rope=read_rope(have, head_dim=sizes["head_dim"]),
    window=switched_window(have),
    qk_norm="head",
    use_bias=bias,
    use_out_bias=bias,
  )
  count, top_k = have.experts(128, chosen=8)
  mixture = MoeConfig(
    width=have.integer("moe_intermediate_size", 768),
    num_experts=count,
    top_k=top_k,
    act=act,
    renormalise=have.flag("norm_topk_prob"),
  )
  layers = [LayerConfig(mixer=mixer, mlp=mlp) for mlp in sparse(have, mixture=mixture, width=6144)]
  return decoder(have, family="qwen3_moe", layers=layers)


def sparse(have: Attributes, *, mixture: MoeConfig, width: int) -> list[MlpConfig | MoeConfig]:
  """Returns the MLP of every layer: the mixture of experts, or a dense MLP.

  Args:
    have: The keys of config.json.
    mixture: The mixture of experts of the layers that have one.
    width: The family's default for the width of the dense MLP.

  Raises:
    InputError: A key is not supported.
  """
  plain = MlpConfig(width=have.integer("intermediate_size", width), act=mixture.act)
  every, plain_layers = have.integer("decoder_sparse_step", 1), have.take("mlp_only_layers", [])
  if not isinstance(plain_layers, list | tuple):
    raise InputError(f"{have.where}: mlp_only_layers = {plain_layers!r} must be a list of layer numbers")
  count = have.integer("num_hidden_layers")
  return [mixture if i not in plain_layers and (i + 1) % every == 0 else plain for i in range(count)]


def written_sparse(config: DecoderConfig) -> dict[str, Any]:
  """Returns the keys of config.json for the MLPs: their sizes, the mixture of experts, and which layers are dense."""
  mlps = [layer.mlp for layer in config.layers]
  fields: dict[str, Any] = {}
  for spec in mlps:
    if isinstance(spec, MlpConfig):
      fields["intermediate_size"] = spec.width
    elif isinstance(spec, MoeConfig):
      fields |= {"num_experts": spec.num_experts, "num_experts_per_tok": spec.top_k}
      fields |= {"moe_intermediate_size": spec.width, "norm_topk_prob": spec.renormalise}
  plain = [i for i, spec in enumerate(mlps) if isinstance(spec, MlpConfig)]
  return {**fields, "decoder_sparse_step": 1, "mlp_only_layers": plain}


def write(config: DecoderConfig) -> dict[str, Any]:
  """Returns the keys of config.json that describe a decoder; the inverse of `read`."""
  mixer = mixers(config)[0]
  return {
    **written(config),
    **written_sparse(config),
    "attention_bias": mixer.use_bias,
    "use_sliding_window": mixer.window is not None,
    "sliding_window": mixer.window,
  }


def table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
  """Returns the name table: the tensors of a checkpoint, with the parameters that they hold."""
  rows = frame(config)
  for index, (layer, mixer) in enumerate(zip(config.layers, mixers(config), strict=True)):
    rows += [*norms(index, config=config), *attention(index, spec=mixer)]
    rows += sparse_mlp(index, spec=layer.mlp)
  return tuple(rows)


def sparse_mlp(index: int, *, spec: MlpConfig | MoeConfig | None) -> list[TensorEntry]:
  """Returns the name-table entries (parameter, tensor) of one layer's MoE and shared expert, or of its dense MLP."""
  if not isinstance(spec, MoeConfig):
    assert spec is not None, index
    return mlp(index, spec=spec)
  ours, theirs = f"layers.{index}.mlp", f"model.layers.{index}.mlp"
  rows = experts(index, spec=spec, block="mlp", names=_NAMES)
  if spec.shared is not None:
    for name, other in _NAMES.items():
      rows += linear(f"{ours}.shared.{name}", f"{theirs}.shared_expert.{other}")
  return [*rows, *linear(f"{ours}.shared_gate", f"{theirs}.shared_expert_gate")] if spec.shared_gated else rows


FAMILY = Family(
  name="qwen3_moe",
  architecture="Qwen3MoeForCausalLM",
  read=read,
  write=write,
  table=table,
)
