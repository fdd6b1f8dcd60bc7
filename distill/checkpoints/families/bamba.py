"""Bamba: Mamba-2 in most layers, and attention in a few, which rotates half of each head (RoPE)."""

from collections.abc import Mapping
from typing import Any

from distill.checkpoints.attributes import Attributes
from distill.checkpoints.families.common import attention, decoder, dense, heads, linear
from distill.checkpoints.families.ropes import read_rope, write_rope
from distill.checkpoints.families.state_space import PREFIXED, kinds, mixer, read_mixer, write_mixer, written_heads
from distill.checkpoints.family import Family
from distill.checkpoints.name_table import TensorEntry
from distill.errors import InputError
from distill.models.config import DecoderConfig, LayerConfig
from distill.nn.attention import AttentionConfig
from distill.nn.mamba2 import Mamba2Config
from distill.nn.mlp import MlpConfig

_ROTATED = 0.5


def read(values: Mapping[str, Any], *, where: str) -> DecoderConfig:
  """Returns the decoder configuration that the keys of a config.json describe.

  Raises:
    InputError: A key is missing, unknown or not supported; the message begins with `where`, the file's name.
  """
  have = Attributes({"max_position_embeddings": 262144, **values}, where=where)
  have.only("hidden_act", ("silu",))
  # Chunks of the kernels, logits that generation computes, and a term of the training loss.
  have.ignore("mamba_chunk_size", "num_logits_to_keep", "z_loss_coefficient")
  sizes, bias = heads(have, kv=None if have.has("num_key_value_heads") else 8), have.flag("attention_bias")
  rope = read_rope(have, head_dim=sizes["head_dim"], partial=True, fraction=_ROTATED)
  if rope.fraction != _ROTATED:
    raise InputError(f"{where}: partial_rotary_factor = {rope.fraction} is not supported; expected {_ROTATED}")
  have.only("attn_rotary_emb", (sizes["head_dim"] // 2,))
  full = AttentionConfig(**sizes, rope=rope, use_bias=bias, use_out_bias=bias)
  space = read_mixer(have, PREFIXED, defaults={"num_heads": 128, "state_size": 256, "num_groups": 1})
  mlp = MlpConfig(width=have.integer("intermediate_size", 14336), use_bias=have.flag("mlp_bias"))
  count, chosen = have.integer("num_hidden_layers"), have.take("attn_layer_indices", [])
  if not isinstance(chosen, list | tuple) or not all(type(x) is int and 0 <= x < count for x in chosen):
    raise InputError(f"{where}: attn_layer_indices = {chosen!r} must be a list of layer indices from 0 to {count - 1}")
  layers = [LayerConfig(mixer=full if i in chosen else space, mlp=mlp) for i in range(count)]
  return decoder(have, family="bamba", layers=layers, norm_eps=1e-5)


def write(config: DecoderConfig) -> dict[str, Any]:
  """Returns the keys of config.json that describe a decoder; the inverse of `read`.

  Raises:
    InputError: The width of the Mamba-2 mixer is not a multiple of the model's width.
  """
  full, space = kinds(config)
  mlp = dense(config)
  return {
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "intermediate_size": mlp.width,
    "num_hidden_layers": len(config.layers),
    "attn_layer_indices": [i for i, layer in enumerate(config.layers) if isinstance(layer.mixer, AttentionConfig)],
    **written_heads(full),
    **write_mixer(space, PREFIXED, width=config.width),
    **({"rope_parameters": write_rope(full.rope)} if full is not None and full.rope is not None else {}),
    "hidden_act": "silu",
    "mlp_bias": mlp.use_bias,
    "max_position_embeddings": config.max_positions,
    "rms_norm_eps": config.norm_eps,
    "tie_word_embeddings": config.tie_embeddings,
  }


def table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
  """Returns the name table: the tensors of a checkpoint, with the parameters that they hold."""
  rows = [
    TensorEntry("embed.table", "model.embed_tokens.weight"),
    TensorEntry("norm.scale", "model.final_layernorm.weight"),
  ]
  bias = dense(config).use_bias
  for index, layer in enumerate(config.layers):
    ours, theirs = f"layers.{index}", f"model.layers.{index}"
    rows.append(TensorEntry(f"{ours}.mixer_norm.scale", f"{theirs}.input_layernorm.weight"))
    rows.append(TensorEntry(f"{ours}.mlp_norm.scale", f"{theirs}.pre_ff_layernorm.weight"))
    for name in ("gate", "up", "down"):
      rows += linear(f"{ours}.mlp.{name}", f"{theirs}.feed_forward.{name}_proj", bias=bias)
    if isinstance(layer.mixer, Mamba2Config):
      rows += mixer(f"{ours}.mixer", f"{theirs}.mamba", spec=layer.mixer)
    elif isinstance(layer.mixer, AttentionConfig):
      rows += attention(index, spec=layer.mixer)
  return tuple(rows if config.tie_embeddings else [*rows, *linear("head", "lm_head")])


FAMILY = Family(
  name="bamba",
  architecture="BambaForCausalLM",
  read=read,
  write=write,
  table=table,
)
