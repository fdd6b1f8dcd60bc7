"""Phi 3, 3.5 and 4: Llama with fused projections, longrope and partial rotation."""

from collections.abc import Mapping
from typing import Any

from distill.checkpoints.attributes import Attributes
from distill.checkpoints.families.common import (
  decoder,
  dense,
  frame,
  fused,
  heads,
  linear,
  mixers,
  norms,
  window,
  written,
)
from distill.checkpoints.families.ropes import read_rope
from distill.checkpoints.family import Family
from distill.checkpoints.name_table import TensorEntry
from distill.models.config import DecoderConfig, LayerConfig
from distill.nn.attention import AttentionConfig
from distill.nn.mlp import MlpConfig
from distill.nn.rope import LongRope

# Earlier names of longrope.
_LONGROPE = ("su", "yarn")


def read(values: Mapping[str, Any], *, where: str) -> DecoderConfig:
  """Returns the decoder configuration that the keys of a config.json describe.

  Raises:
    InputError: A key is missing, unknown or not supported; the message begins with `where`, the file's name.
  """
  renamed = dict(values)
  for key in ("rope_scaling", "rope_parameters"):
    rope = values.get(key)
    if isinstance(rope, Mapping):
      names = {x: "longrope" for x in ("type", "rope_type") if rope.get(x) in _LONGROPE}
      renamed[key] = {**rope, **names}
  have = Attributes({"original_max_position_embeddings": 4096, **renamed}, where=where)
  for key in ("full_attn_mod", "interpolate_factor"):
    have.only(key, (1,))
  sizes = heads(have)
  rope = read_rope(have, head_dim=sizes["head_dim"], partial=True)
  mixer = AttentionConfig(**sizes, rope=rope, window=window(have))
  mlp = MlpConfig(width=have.integer("intermediate_size"), act=have.activation())
  layers = (LayerConfig(mixer=mixer, mlp=mlp),) * have.integer("num_hidden_layers")
  return decoder(have, family="phi3", layers=layers, norm_eps=1e-5)


def write(config: DecoderConfig) -> dict[str, Any]:
  """Returns the keys of config.json that describe a decoder; the inverse of `read`."""
  mixer = mixers(config)[0]
  scaling = mixer.rope.scaling if mixer.rope is not None else None
  original = {
    "original_max_position_embeddings": scaling.original_max_positions if isinstance(scaling, LongRope) else 4096
  }
  # transformers' default ids of special tokens may lie outside a small vocabulary.
  return {**written(config), "sliding_window": mixer.window, **original, "pad_token_id": None}


def table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
  """Returns the name table: the tensors of a checkpoint, with the parameters that they hold."""
  rows = frame(config)
  for index, mixer in enumerate(mixers(config)):
    ours, theirs = f"layers.{index}", f"model.layers.{index}"
    queries, keys = mixer.num_heads * mixer.head_dim, mixer.num_kv_heads * mixer.head_dim
    rows += norms(index, config=config)
    sizes = {"q": queries, "k": keys, "v": keys}
    rows += fused(sizes, ours=f"{ours}.mixer.{{}}.kernel", theirs=f"{theirs}.self_attn.qkv_proj.weight")
    rows += linear(f"{ours}.mixer.o", f"{theirs}.self_attn.o_proj")
    width = dense(config).width
    sizes = {"gate": width, "up": width}
    rows += fused(sizes, ours=f"{ours}.mlp.{{}}.kernel", theirs=f"{theirs}.mlp.gate_up_proj.weight")
    rows += linear(f"{ours}.mlp.down", f"{theirs}.mlp.down_proj")
  return tuple(rows)


FAMILY = Family(
  name="phi3",
  architecture="Phi3ForCausalLM",
  read=read,
  write=write,
  table=table,
)
