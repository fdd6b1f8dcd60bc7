"""Gemma 2: norms before and after mixer and MLP, softcaps, a sliding window on every other layer."""

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
  mixers,
  window,
  windowed,
  written,
  written_windows,
)
from distill.checkpoints.families.gemma import ACT, traits
from distill.checkpoints.families.ropes import read_rope
from distill.checkpoints.family import Family
from distill.errors import InputError
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
  have.ignore("hidden_act", "sliding_window_size")
  sizes, bias = heads(have, kv=4, head_dim=256), have.flag("attention_bias")
  default = [FULL if i % 2 else SLIDING for i in range(have.integer("num_hidden_layers"))]
  mixer = AttentionConfig(
    **sizes,
    rope=read_rope(have, head_dim=sizes["head_dim"]),
    scale=query_scale(have),
    softcap=softcap(have, "attn_logit_softcapping", 50.0),
    use_bias=bias,
    use_out_bias=bias,
  )
  mlp = MlpConfig(width=have.integer("intermediate_size"), act=have.activation("hidden_activation", ACT))
  layers = windowed(have, default, size=window(have, 4096), mixer=mixer, mlp=mlp)
  cap = softcap(have, "final_logit_softcapping", 30.0)
  return decoder(have, family="gemma2", layers=layers, norms="both", logit_softcap=cap, **traits(have))


def query_scale(have: Attributes) -> float:
  """Returns the factor that multiplies query-key products: `query_pre_attn_scalar` ** −0.5."""
  return have.integer("query_pre_attn_scalar", 256) ** -0.5


def softcap(have: Attributes, key: str, default: float | None) -> float | None:
  """Returns the value of a key that holds a softcap (the limit that tanh puts on logits), or None if it is null.

  Raises:
    InputError: The value is anything but a positive number.
  """
  value = have.get(key) if have.has(key) else default
  if value is None:
    return None
  if have.finite(key, value) <= 0:
    raise InputError(f"{have.where}: {key} = {value} is not positive; give a positive number, or null for no softcap")
  return float(value)


def write(config: DecoderConfig) -> dict[str, Any]:
  """Returns the keys of config.json that describe a decoder; the inverse of `read`."""
  mixer = mixers(config)[0]
  assert mixer.scale is not None, mixer
  fields = written(config)
  del fields["hidden_act"]
  return {
    **fields,
    **written_windows(config),
    "hidden_activation": dense(config).act,
    "attention_bias": mixer.use_bias,
    "query_pre_attn_scalar": round(mixer.scale**-2),
    "attn_logit_softcapping": mixer.softcap,
    "final_logit_softcapping": config.logit_softcap,
  }


FAMILY = Family(
  name="gemma2",
  architecture="Gemma2ForCausalLM",
  read=read,
  write=write,
  table=dense_table,
)
