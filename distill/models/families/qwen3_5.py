"""Qwen 3.5, text only: gated delta rule and gated attention."""

from collections.abc import Mapping
from typing import Any

from distill.errors import InputError
from distill.models.config import Attention, DecoderConfig, GatedDelta, LayerConfig, Mlp
from distill.models.families.common import Attributes, attention, block, frame, linear, write_rope
from distill.models.families.mapping import Entry

ARCHITECTURE = "Qwen3_5ForCausalLM"
_KINDS = ("linear_attention", "full_attention")


def read(values: Mapping[str, Any], *, where: str) -> DecoderConfig:
  """Architecture of an HF configuration.

  Raises:
    InputError: An attribute is missing, unknown or not supported.
  """
  have = Attributes(values, where=where)
  have.only("hidden_act", ("silu",))
  count, every = int(have.take("num_hidden_layers")), int(have.take("full_attention_interval", 4))
  kinds = tuple(have.take("layer_types", tuple(_KINDS[(i + 1) % every == 0] for i in range(count))))
  if len(kinds) != count or set(kinds) - set(_KINDS):
    raise InputError(f"{where}: layer_types must name {count} layers, each {' or '.join(_KINDS)}")
  bias = bool(have.take("attention_bias", False))
  full = Attention(
    num_heads=int(have.take("num_attention_heads")),
    num_kv_heads=int(have.take("num_key_value_heads")),
    head_dim=int(have.take("head_dim", 256)),
    rope=have.rope(fraction=0.25),
    gated=True,
    qk_norm=True,
    use_bias=bias,
    use_out_bias=bias,
  )
  delta = GatedDelta(
    num_key_heads=int(have.take("linear_num_key_heads", 16)),
    num_value_heads=int(have.take("linear_num_value_heads", 32)),
    key_head_dim=int(have.take("linear_key_head_dim", 128)),
    value_head_dim=int(have.take("linear_value_head_dim", 128)),
    conv_width=int(have.take("linear_conv_kernel_dim", 4)),
  )
  if full.num_heads % full.num_kv_heads or delta.num_value_heads % delta.num_key_heads:
    raise InputError(f"{where}: key heads must divide query heads, and linear_num_key_heads linear_num_value_heads")
  mlp = Mlp(width=int(have.take("intermediate_size")))
  mixers: dict[str, Attention | GatedDelta] = {"full_attention": full, "linear_attention": delta}
  config = DecoderConfig(
    family="qwen3_5_text",
    vocab_size=int(have.take("vocab_size")),
    width=int(have.take("hidden_size")),
    layers=tuple(LayerConfig(mixer=mixers[kind], mlp=mlp) for kind in kinds),
    norm_eps=float(have.take("rms_norm_eps", 1e-6)),
    norm_offset=1.0,
    tie_embeddings=bool(have.take("tie_word_embeddings", False)),
    max_positions=int(have.take("max_position_embeddings", 32768)),
  )
  have.finish()
  return config


def write(config: DecoderConfig) -> dict[str, Any]:
  """HF configuration of an architecture of this family."""
  full = next((x.mixer for x in config.layers if isinstance(x.mixer, Attention)), None)
  delta = next((x.mixer for x in config.layers if isinstance(x.mixer, GatedDelta)), None)
  if full is None or delta is None:
    raise InputError("qwen3_5_text: needs at least one layer of full and one of linear attention to be written")
  return {
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "intermediate_size": config.layers[0].mlp.width,
    "num_hidden_layers": len(config.layers),
    "layer_types": [_KINDS[isinstance(layer.mixer, Attention)] for layer in config.layers],
    "num_attention_heads": full.num_heads,
    "num_key_value_heads": full.num_kv_heads,
    "head_dim": full.head_dim,
    "linear_num_key_heads": delta.num_key_heads,
    "linear_num_value_heads": delta.num_value_heads,
    "linear_key_head_dim": delta.key_head_dim,
    "linear_value_head_dim": delta.value_head_dim,
    "linear_conv_kernel_dim": delta.conv_width,
    "hidden_act": "silu",
    "max_position_embeddings": config.max_positions,
    "rms_norm_eps": config.norm_eps,
    "rope_parameters": {**write_rope(full.rope), "partial_rotary_factor": full.rope.fraction},
    "attention_bias": full.use_bias,
    "tie_word_embeddings": config.tie_embeddings,
  }


def table(config: DecoderConfig) -> tuple[Entry, ...]:
  """Every parameter under both names."""
  rows = frame(tied=config.tie_embeddings)
  for index, layer in enumerate(config.layers):
    rows += block(index, mlp_bias=False)
    if isinstance(layer.mixer, Attention):
      rows += attention(index, bias=layer.mixer.use_bias, out_bias=layer.mixer.use_out_bias, qk_norm=True)
    else:
      rows += _delta(f"layers.{index}.mixer", f"model.layers.{index}.linear_attn")
  return tuple(rows)


def _delta(ours: str, theirs: str) -> list[Entry]:
  rows = [row for name in ("qkv", "z", "b", "a") for row in linear(f"{ours}.{name}", f"{theirs}.in_proj_{name}")]
  return [
    *rows,
    Entry(f"{ours}.conv.kernel", f"{theirs}.conv1d.weight", "conv"),
    Entry(f"{ours}.dt_bias", f"{theirs}.dt_bias"),
    Entry(f"{ours}.a_log", f"{theirs}.A_log"),
    Entry(f"{ours}.norm.scale", f"{theirs}.norm.weight"),
    *linear(f"{ours}.o", f"{theirs}.out_proj"),
  ]
