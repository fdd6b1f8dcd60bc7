"""Llama 2 and 3, and models of the same architecture."""

from collections.abc import Mapping
from typing import Any

from distill.checkpoints.attributes import Attributes
from distill.checkpoints.families.common import decoder, dense, dense_table, heads, mixers, written
from distill.checkpoints.families.ropes import read_rope
from distill.checkpoints.family import Family
from distill.models.config import DecoderConfig, LayerConfig
from distill.nn.attention import AttentionConfig
from distill.nn.mlp import MlpConfig


def read(values: Mapping[str, Any], *, where: str) -> DecoderConfig:
  """Returns the decoder configuration that the keys of a config.json describe.

  Raises:
    InputError: A key is missing, unknown or not supported; the message begins with `where`, the file's name.
  """
  have = Attributes(values, where=where)
  have.only("rope_interleaved", (False,))
  sizes, bias = heads(have), have.flag("attention_bias")
  rope = read_rope(have, head_dim=sizes["head_dim"])
  mixer = AttentionConfig(**sizes, rope=rope, use_bias=bias, use_out_bias=bias)
  mlp = MlpConfig(width=have.integer("intermediate_size"), act=have.activation(), use_bias=have.flag("mlp_bias"))
  return decoder(have, family="llama", layers=(LayerConfig(mixer=mixer, mlp=mlp),) * have.integer("num_hidden_layers"))


def write(config: DecoderConfig) -> dict[str, Any]:
  """Returns the keys of config.json that describe a decoder; the inverse of `read`."""
  return {
    **written(config),
    "attention_bias": mixers(config)[0].use_bias,
    "mlp_bias": dense(config).use_bias,
  }


FAMILY = Family(
  name="llama",
  architecture="LlamaForCausalLM",
  read=read,
  write=write,
  table=dense_table,
)
