"""SmolLM 3: Llama with layers that have no rope."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from distill.checkpoints.attributes import Attributes
from distill.checkpoints.families.common import (
  FULL,
  SLIDING,
  decoder,
  dense,
  dense_table,
  heads,
  layer_windows,
  mixers,
  window,
  written,
  written_windows,
)
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
  sizes, bias, count = heads(have, kv=4), have.flag("attention_bias"), have.integer("num_hidden_layers")
  rope = read_rope(have, head_dim=sizes["head_dim"], theta=2e6)
  every = have.integer("no_rope_layer_interval", 4)
  # Despite its name, no_rope_layers holds 1 for layers with rope.
  roped = have.one_a_layer("no_rope_layers", [int((i + 1) % every != 0) for i in range(count)], allowed=(0, 1))
  size = window(have) if have.flag("use_sliding_window") else None
  have.ignore("sliding_window", "max_window_layers")
  windows = layer_windows(have, [FULL if size is None or one else SLIDING for one in roped], size=size)
  mlp = MlpConfig(width=have.integer("intermediate_size"), act=have.activation(), use_bias=have.flag("mlp_bias"))
  mixer = AttentionConfig(**sizes, rope=rope, use_bias=bias, use_out_bias=bias)
  layers = [
    LayerConfig(mixer=dataclasses.replace(mixer, rope=rope if one else None, window=size), mlp=mlp)
    for one, size in zip(roped, windows, strict=True)
  ]
  return decoder(have, family="smollm3", layers=layers, tied=True)


def write(config: DecoderConfig) -> dict[str, Any]:
  """Returns the keys of config.json that describe a decoder; the inverse of `read`."""
  kinds = written_windows(config)
  return {
    **written(config),
    **kinds,
    "use_sliding_window": kinds["sliding_window"] is not None,
    "no_rope_layers": [int(mixer.rope is not None) for mixer in mixers(config)],
    "attention_bias": mixers(config)[0].use_bias,
    "mlp_bias": dense(config).use_bias,
    "pad_token_id": None,
  }


FAMILY = Family(
  name="smollm3",
  architecture="SmolLM3ForCausalLM",
  read=read,
  write=write,
  table=dense_table,
)
