"""OLMo 3: OLMo 2 with a sliding window in three of four layers.

Layers with and without a window have different rotary embeddings.
"""

from collections.abc import Mapping
from typing import Any

from distill.checkpoints.attributes import Attributes
from distill.checkpoints.families import olmo2
from distill.checkpoints.families.common import (
  FULL,
  SLIDING,
  decoder,
  dense_table,
  heads,
  mixers,
  window,
  windowed,
  written_ropes,
  written_windows,
)
from distill.checkpoints.families.ropes import read_nested_ropes
from distill.checkpoints.family import Family
from distill.models.config import DecoderConfig
from distill.nn.attention import AttentionConfig
from distill.nn.mlp import MlpConfig


def read(values: Mapping[str, Any], *, where: str) -> DecoderConfig:
  """Returns the decoder configuration that the keys of a config.json describe.

  Raises:
    InputError: A key is missing, unknown or not supported; the message begins with `where`, the file's name.
  """
  have = Attributes(values, where=where)
  sizes, bias = heads(have), have.flag("attention_bias")
  default = [SLIDING if (i + 1) % 4 else FULL for i in range(have.integer("num_hidden_layers"))]
  full, local = read_nested_ropes(have, head_dim=sizes["head_dim"], theta=(5e5, 5e5))
  mixer = AttentionConfig(**sizes, rope=full, qk_norm="full", use_bias=bias, use_out_bias=bias)
  mlp = MlpConfig(width=have.integer("intermediate_size"), act=have.activation())
  layers = windowed(have, default, size=window(have, 4096), mixer=mixer, mlp=mlp, local=local)
  return decoder(have, family="olmo3", layers=layers, norms="post", norm_eps=1e-5)


def write(config: DecoderConfig) -> dict[str, Any]:
  """Returns the keys of config.json that describe a decoder; the inverse of `read`."""
  return {**olmo2.write(config), **written_windows(config), "rope_parameters": written_ropes(mixers(config))}


FAMILY = Family(
  name="olmo3",
  architecture="Olmo3ForCausalLM",
  read=read,
  write=write,
  table=dense_table,
)
