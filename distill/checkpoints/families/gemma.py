"""Gemma 1: scaled embeddings, norm scales stored as differences from one. Gemma 2 and 3 share both traits."""

import math
from collections.abc import Mapping
from typing import Any

from distill.checkpoints.attributes import Attributes
from distill.checkpoints.families.common import decoder, dense_table, heads, mixers, written
from distill.checkpoints.families.ropes import read_rope
from distill.checkpoints.family import Family
from distill.models.config import DecoderConfig, LayerConfig
from distill.nn.attention import AttentionConfig
from distill.nn.mlp import MlpConfig

ACT = "gelu_pytorch_tanh"


def read(values: Mapping[str, Any], *, where: str) -> DecoderConfig:
  """Returns the decoder configuration that the keys of a config.json describe.

  Raises:
    InputError: A key is missing, unknown or not supported; the message begins with `where`, the file's name.
  """
  have = Attributes(values, where=where)
  have.only("use_bidirectional_attention", (False,))
  # transformers reads hidden_act only.
  have.only("hidden_activation", (ACT, "gelu"))
  # The first checkpoints say gelu but were trained with its tanh approximation.
  act = ACT if have.get("hidden_act") == "gelu" else have.activation(default=ACT)
  sizes, bias = heads(have, kv=16, head_dim=256), have.flag("attention_bias")
  rope = read_rope(have, head_dim=sizes["head_dim"])
  mixer = AttentionConfig(**sizes, rope=rope, use_bias=bias, use_out_bias=bias)
  mlp = MlpConfig(width=have.integer("intermediate_size"), act=act)
  layers = (LayerConfig(mixer=mixer, mlp=mlp),) * have.integer("num_hidden_layers")
  return decoder(have, family="gemma", layers=layers, **traits(have))


def traits(have: Attributes) -> dict[str, Any]:
  """Returns the decoder fields that all Gemma models share, as keyword arguments for `common.decoder`."""
  scale = math.sqrt(have.integer("hidden_size"))
  return {"tied": True, "norm_offset": 1.0, "embed_scale": scale, "round_embed_scale": True}


def write(config: DecoderConfig) -> dict[str, Any]:
  """Returns the keys of config.json that describe a decoder; the inverse of `read`."""
  return {**written(config), "attention_bias": mixers(config)[0].use_bias}


FAMILY = Family(
  name="gemma",
  architecture="GemmaForCausalLM",
  read=read,
  write=write,
  table=dense_table,
)
