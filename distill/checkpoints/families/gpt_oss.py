"""gpt-oss: attention sinks, a sliding window on every other layer, mixtures of experts with a clamped gate."""

from collections.abc import Mapping
from typing import Any

from distill.checkpoints.attributes import Attributes
from distill.checkpoints.families.common import (
  FULL,
  SLIDING,
  attention,
  decoder,
  frame,
  heads,
  linear,
  mixers,
  norms,
  window,
  windowed,
  written,
  written_windows,
)
from distill.checkpoints.families.ropes import read_rope
from distill.checkpoints.family import Family
from distill.checkpoints.name_table import Part, TensorEntry
from distill.models.config import DecoderConfig
from distill.nn.attention import AttentionConfig
from distill.nn.moe import MoeConfig

_ROPE = {
  "rope_type": "yarn",
  "factor": 32.0,
  "beta_fast": 32.0,
  "beta_slow": 1.0,
  "truncate": False,
  "original_max_position_embeddings": 4096,
}


def read(values: Mapping[str, Any], *, where: str) -> DecoderConfig:
  """Returns the decoder configuration that the keys of a config.json describe.

  Raises:
    InputError: A key is missing, unknown or not supported; the message begins with `where`, the file's name.
  """
  roped = values.get("rope_parameters") or values.get("rope_scaling")
  have = Attributes(values if roped else {**values, "rope_parameters": _ROPE}, where=where)
  have.only("hidden_act", ("silu",))
  # Duplicates of keys that transformers reads.
  have.ignore("experts_per_token", "initial_context_length")
  sizes, bias = heads(have, kv=8, head_dim=64), have.flag("attention_bias", True)
  default = [FULL if i % 2 else SLIDING for i in range(have.integer("num_hidden_layers"))]
  rope = read_rope(have, head_dim=sizes["head_dim"], theta=150_000.0)
  mixer = AttentionConfig(**sizes, rope=rope, sinks=True, use_bias=bias, use_out_bias=bias)
  count, top_k = have.experts(128, chosen=4)
  mlp = MoeConfig(
    width=have.integer("intermediate_size"),
    num_experts=count,
    top_k=top_k,
    use_bias=True,
    clamp=(have.number("swiglu_alpha", 1.702), have.number("swiglu_limit", 7.0)),
  )
  layers = windowed(have, default, size=window(have, 128), mixer=mixer, mlp=mlp)
  return decoder(have, family="gpt_oss", layers=layers, norm_eps=1e-5)


def write(config: DecoderConfig) -> dict[str, Any]:
  """Returns the keys of config.json that describe a decoder; the inverse of `read`."""
  mlp = config.layers[0].mlp
  assert isinstance(mlp, MoeConfig) and mlp.clamp is not None, mlp
  return {
    **written(config),
    **written_windows(config),
    "attention_bias": mixers(config)[0].use_bias,
    "num_local_experts": mlp.num_experts,
    "num_experts_per_tok": mlp.top_k,
    "swiglu_alpha": mlp.clamp[0],
    "swiglu_limit": mlp.clamp[1],
  }


def table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
  """Returns the name table: the tensors of a checkpoint, with the parameters that they hold."""
  rows = frame(config)
  for index, (layer, mixer) in enumerate(zip(config.layers, mixers(config), strict=True)):
    ours, theirs = f"layers.{index}.mlp", f"model.layers.{index}.mlp"
    assert isinstance(layer.mlp, MoeConfig), layer.mlp
    rows += [*norms(index, config=config), *attention(index, spec=mixer)]
    rows += linear(f"{ours}.router", f"{theirs}.router", bias=True)
    for place, name in enumerate(("gate", "up")):
      part = Part(place, place + 1, 2)
      rows.append(TensorEntry(f"{ours}.experts.{name}.kernel", f"{theirs}.experts.gate_up_proj", part=part))
      rows.append(TensorEntry(f"{ours}.experts.{name}.bias", f"{theirs}.experts.gate_up_proj_bias", part=part))
    rows.append(TensorEntry(f"{ours}.experts.down.kernel", f"{theirs}.experts.down_proj"))
    rows.append(TensorEntry(f"{ours}.experts.down.bias", f"{theirs}.experts.down_proj_bias"))
  return tuple(rows)


FAMILY = Family(
  name="gpt_oss",
  architecture="GptOssForCausalLM",
  read=read,
  write=write,
  table=table,
)
