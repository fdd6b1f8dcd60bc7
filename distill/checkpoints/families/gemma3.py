"""Gemma 3, text only: Gemma 2 with normed queries and keys and another rope base for sliding-window layers."""

from collections.abc import Mapping
from typing import Any

from distill.checkpoints.attributes import Attributes
from distill.checkpoints.families import gemma2
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
)
from distill.checkpoints.families.gemma import ACT, traits
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
  have.only("use_bidirectional_attention", (False,))
  # Configurations of this family have these keys, but no layer in transformers reads them.
  have.ignore("attn_logit_softcapping", "_sliding_window_pattern", "hidden_act")
  sizes, bias = heads(have, kv=4, head_dim=256), have.flag("attention_bias")
  every = have.integer("sliding_window_pattern", 6)
  default = [SLIDING if (i + 1) % every else FULL for i in range(have.integer("num_hidden_layers"))]
  full, local = read_nested_ropes(
    have, head_dim=sizes["head_dim"], theta=(1e6, 1e4), local_theta_key="rope_local_base_freq"
  )
  scale = gemma2.query_scale(have)
  mixer = AttentionConfig(**sizes, rope=full, scale=scale, qk_norm="head", use_bias=bias, use_out_bias=bias)
  mlp = MlpConfig(width=have.integer("intermediate_size"), act=have.activation("hidden_activation", ACT))
  layers = windowed(have, default, size=window(have, 4096), mixer=mixer, mlp=mlp, local=local)
  cap = gemma2.softcap(have, "final_logit_softcapping", None)
  return decoder(have, family="gemma3_text", layers=layers, norms="both", logit_softcap=cap, **traits(have))


def write(config: DecoderConfig) -> dict[str, Any]:
  """Returns the keys of config.json that describe a decoder; the inverse of `read`."""
  return {**gemma2.write(config), "rope_parameters": written_ropes(mixers(config))}


FAMILY = Family(
  name="gemma3_text",
  architecture="Gemma3ForCausalLM",
  read=read,
  write=write,
  table=dense_table,
)
