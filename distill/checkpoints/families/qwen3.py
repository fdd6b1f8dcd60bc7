"""Qwen 3: Qwen 2 with normed queries and keys, and with biases only if `attention_bias` is true."""

from collections.abc import Mapping
from typing import Any

from distill.checkpoints.attributes import Attributes
from distill.checkpoints.families import qwen2
from distill.checkpoints.families.common import decoder, dense_table, heads, mixers
from distill.checkpoints.families.ropes import read_rope
from distill.checkpoints.family import Family
from distill.models.config import DecoderConfig
from distill.nn.attention import AttentionConfig


def read(values: Mapping[str, Any], *, where: str) -> DecoderConfig:
  """Returns the decoder configuration that the keys of a config.json describe.

  Raises:
    InputError: A key is missing, unknown or not supported; the message begins with `where`, the file's name.
  """
  have = Attributes(values, where=where)
  sizes, bias = heads(have, kv=32, head_dim=128), have.flag("attention_bias")
  rope = read_rope(have, head_dim=sizes["head_dim"])
  mixer = AttentionConfig(**sizes, rope=rope, qk_norm="head", use_bias=bias, use_out_bias=bias)
  return decoder(have, family="qwen3", layers=qwen2.switched_layers(have, mixer=mixer))


def write(config: DecoderConfig) -> dict[str, Any]:
  """Returns the keys of config.json that describe a decoder; the inverse of `read`."""
  return {**qwen2.write(config), "attention_bias": mixers(config)[0].use_bias}


FAMILY = Family(
  name="qwen3",
  architecture="Qwen3ForCausalLM",
  read=read,
  write=write,
  table=dense_table,
)
