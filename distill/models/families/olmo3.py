"""OLMo 3: OLMo 2 with windows on three layers of four and a rope of their own."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from distill.models.config import DecoderConfig, LayerConfig
from distill.models.families import olmo2
from distill.models.families.attributes import Attributes
from distill.models.families.common import (
  FULL,
  SLIDING,
  decoder,
  dense_table,
  heads,
  layer_windows,
  mixers,
  window,
  written_ropes,
  written_windows,
)
from distill.models.families.ropes import read_nested_ropes
from distill.nn.attention import Attention
from distill.nn.mlp import Mlp

ARCHITECTURE = "Olmo3ForCausalLM"
table = dense_table


def read(values: Mapping[str, Any], *, where: str) -> DecoderConfig:
  """Architecture of an HF configuration.

  Raises:
    InputError: An attribute is missing, unknown or not supported.
  """
  have = Attributes(values, where=where)
  sizes, bias = heads(have), have.flag("attention_bias")
  default = [SLIDING if (i + 1) % 4 else FULL for i in range(have.layer_count())]
  full, local = read_nested_ropes(have, head_dim=sizes["head_dim"], theta=(5e5, 5e5))
  mixer = Attention(**sizes, rope=full, qk_norm="full", use_bias=bias, use_out_bias=bias)
  mlp = Mlp(width=have.integer("intermediate_size"), act=have.activation())
  layers = [
    LayerConfig(mixer=dataclasses.replace(mixer, rope=full if size is None else local, window=size), mlp=mlp)
    for size in layer_windows(have, default, size=window(have, 4096))
  ]
  return decoder(have, family="olmo3", layers=layers, norms="post", norm_eps=1e-5)


def write(config: DecoderConfig) -> dict[str, Any]:
  """HF configuration of an architecture of this family."""
  return {**olmo2.write(config), **written_windows(config), "rope_parameters": written_ropes(mixers(config))}
