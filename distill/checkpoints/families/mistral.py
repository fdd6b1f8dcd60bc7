"""Mistral: Llama with a sliding window on every layer."""

from collections.abc import Mapping
from typing import Any

from distill.checkpoints.attributes import Attributes
from distill.checkpoints.families.common import decoder, dense_table, heads, mixers, window, written
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
  sizes = heads(have, kv=8)
  rope = read_rope(have, head_dim=sizes["head_dim"])
  mixer = AttentionConfig(**sizes, rope=rope, window=window(have, 4096))
  mlp = MlpConfig(width=have.integer("intermediate_size"), act=have.activation())
  return decoder(
    have, family="mistral", layers=(LayerConfig(mixer=mixer, mlp=mlp),) * have.integer("num_hidden_layers")
  )


def write(config: DecoderConfig) -> dict[str, Any]:
  """Returns the keys of config.json that describe a decoder; the inverse of `read`."""
  return {**written(config), "sliding_window": mixers(config)[0].window}


FAMILY = Family(
  name="mistral",
  architecture="MistralForCausalLM",
  read=read,
  write=write,
  table=dense_table,
)
