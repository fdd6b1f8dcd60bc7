"""Llama 2 and 3, and what is exactly it."""

from collections.abc import Mapping
from typing import Any

from distill.errors import InputError
from distill.models.config import Attention, DecoderConfig, LayerConfig, Mlp
from distill.models.families.common import Attributes, attention, block, frame, write_rope
from distill.models.families.mapping import Entry

ARCHITECTURE = "LlamaForCausalLM"


def read(values: Mapping[str, Any], *, where: str) -> DecoderConfig:
  """Architecture of an HF configuration.

  Raises:
    InputError: An attribute is missing, unknown or not supported.
  """
  have = Attributes(values, where=where)
  have.only("hidden_act", ("silu",))
  width, heads = int(have.take("hidden_size")), int(have.take("num_attention_heads"))
  bias = bool(have.take("attention_bias", False))
  mixer = Attention(
    num_heads=heads,
    num_kv_heads=int(have.take("num_key_value_heads", heads)),
    head_dim=int(have.take("head_dim", width // heads)),
    rope=have.rope(),
    use_bias=bias,
    use_out_bias=bias,
  )
  if mixer.num_heads % mixer.num_kv_heads:
    raise InputError(f"{where}: num_key_value_heads {mixer.num_kv_heads} does not divide {mixer.num_heads} heads")
  mlp = Mlp(width=int(have.take("intermediate_size")), use_bias=bool(have.take("mlp_bias", False)))
  config = DecoderConfig(
    family="llama",
    vocab_size=int(have.take("vocab_size")),
    width=width,
    layers=(LayerConfig(mixer=mixer, mlp=mlp),) * int(have.take("num_hidden_layers")),
    norm_eps=float(have.take("rms_norm_eps", 1e-6)),
    tie_embeddings=bool(have.take("tie_word_embeddings", False)),
    max_positions=int(have.take("max_position_embeddings", 2048)),
  )
  have.finish()
  return config


def write(config: DecoderConfig) -> dict[str, Any]:
  """HF configuration of an architecture of this family."""
  mixer, mlp = config.layers[0].mixer, config.layers[0].mlp
  assert isinstance(mixer, Attention), mixer
  return {
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "intermediate_size": mlp.width,
    "num_hidden_layers": len(config.layers),
    "num_attention_heads": mixer.num_heads,
    "num_key_value_heads": mixer.num_kv_heads,
    "head_dim": mixer.head_dim,
    "hidden_act": "silu",
    "max_position_embeddings": config.max_positions,
    "rms_norm_eps": config.norm_eps,
    "rope_parameters": write_rope(mixer.rope),
    "attention_bias": mixer.use_bias,
    "mlp_bias": mlp.use_bias,
    "tie_word_embeddings": config.tie_embeddings,
  }


def table(config: DecoderConfig) -> tuple[Entry, ...]:
  """Every parameter under both names."""
  rows = frame(tied=config.tie_embeddings)
  for index, layer in enumerate(config.layers):
    mixer = layer.mixer
    assert isinstance(mixer, Attention), mixer
    rows += block(index, mlp_bias=layer.mlp.use_bias)
    rows += attention(index, bias=mixer.use_bias, out_bias=mixer.use_out_bias, qk_norm=False)
  return tuple(rows)
