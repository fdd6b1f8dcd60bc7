"""Granite 3: Llama with multipliers on embeddings, attention scores, residuals and logits."""

from collections.abc import Mapping
from typing import Any

from distill.checkpoints.attributes import Attributes
from distill.checkpoints.families.common import decoder, dense, dense_table, heads, mixers, written
from distill.checkpoints.families.ropes import read_rope
from distill.checkpoints.family import Family
from distill.errors import InputError
from distill.models.config import DecoderConfig, LayerConfig
from distill.nn.attention import AttentionConfig
from distill.nn.mlp import MlpConfig


def read(values: Mapping[str, Any], *, where: str) -> DecoderConfig:
  """Returns the decoder configuration that the keys of a config.json describe.

  Raises:
    InputError: A key is missing, unknown or not supported; the message begins with `where`, the file's name.
  """
  have = Attributes(values, where=where)
  sizes, bias = heads(have), have.flag("attention_bias")
  rope, scale = read_rope(have, head_dim=sizes["head_dim"]), have.number("attention_multiplier", 1.0)
  mixer = AttentionConfig(**sizes, rope=rope, scale=scale, use_bias=bias, use_out_bias=bias)
  mlp = MlpConfig(width=have.integer("intermediate_size"), act=have.activation(), use_bias=have.flag("mlp_bias"))
  divisor = have.number("logits_scaling", 1.0)
  if divisor == 0:
    raise InputError(f"{where}: logits_scaling is 0, but the logits are divided by it; give another number")
  return decoder(
    have,
    family="granite",
    layers=(LayerConfig(mixer=mixer, mlp=mlp),) * have.integer("num_hidden_layers"),
    embed_scale=have.number("embedding_multiplier", 1.0),
    residual_scale=have.number("residual_multiplier", 1.0),
    logit_scale=1.0 / divisor,
  )


def write(config: DecoderConfig) -> dict[str, Any]:
  """Returns the keys of config.json that describe a decoder; the inverse of `read`."""
  mixer = mixers(config)[0]
  return {
    **written(config),
    "attention_bias": mixer.use_bias,
    "mlp_bias": dense(config).use_bias,
    "attention_multiplier": mixer.head_dim**-0.5 if mixer.scale is None else mixer.scale,
    "embedding_multiplier": config.embed_scale,
    "residual_multiplier": config.residual_scale,
    "logits_scaling": 1.0 / config.logit_scale,
  }


FAMILY = Family(
  name="granite",
  architecture="GraniteForCausalLM",
  read=read,
  write=write,
  table=dense_table,
)
