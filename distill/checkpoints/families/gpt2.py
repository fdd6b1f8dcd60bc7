"""GPT-2: learned positions, LayerNorms, biases everywhere, an MLP without a gate."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from distill.checkpoints.attributes import Attributes
from distill.checkpoints.families.common import dense, linear, mixers
from distill.checkpoints.family import Family
from distill.checkpoints.name_table import Part, TensorEntry
from distill.errors import InputError
from distill.models.config import DecoderConfig, LayerConfig
from distill.nn.attention import AttentionConfig
from distill.nn.mlp import MlpConfig

_SUMMARY = ("type", "use_proj", "activation", "proj_to_labels", "first_dropout", "last_dropout")
# Names of other families, which transformers accepts too.
_RENAMED = {
  "hidden_size": "n_embd",
  "num_hidden_layers": "n_layer",
  "num_attention_heads": "n_head",
  "max_position_embeddings": "n_positions",
}


def read(values: Mapping[str, Any], *, where: str) -> DecoderConfig:
  """Returns the decoder configuration that the keys of a config.json describe.

  Raises:
    InputError: A key is missing, unknown or not supported, or given under two names; the message begins with `where`.
  """
  if twice := next((key for key, name in _RENAMED.items() if key in values and name in values), None):
    raise InputError(f"{where}: the keys {twice} and {_RENAMED[twice]} mean the same; remove one of them")
  have = Attributes({_RENAMED.get(key, key): value for key, value in values.items()}, where=where)
  have.only("add_cross_attention", (False,))
  have.ignore(
    "n_ctx", "n_special", "predict_special_tokens", "reorder_and_upcast_attn", *(f"summary_{name}" for name in _SUMMARY)
  )
  width, count, layers = have.integer("n_embd"), have.integer("n_head"), have.integer("n_layer")
  if width % count:
    raise InputError(f"{where}: n_head {count} does not divide n_embd {width}; correct one of them")
  scale = (width // count) ** -0.5 if have.flag("scale_attn_weights", True) else 1.0
  by_layer = have.flag("scale_attn_by_inverse_layer_idx")
  mlp = MlpConfig(
    width=have.integer("n_inner", 4 * width),
    act=have.activation("activation_function", "gelu_new"),
    gated=False,
    use_bias=True,
  )
  mixer = AttentionConfig(
    num_heads=count,
    num_kv_heads=count,
    head_dim=width // count,
    rope=None,
    use_bias=True,
    use_out_bias=True,
  )
  scales = [scale / (i + 1 if by_layer else 1) for i in range(layers)]
  config = DecoderConfig(
    family="gpt2",
    vocab_size=have.integer("vocab_size"),
    width=width,
    layers=tuple(LayerConfig(mixer=dataclasses.replace(mixer, scale=one), mlp=mlp) for one in scales),
    norm="layer",
    norm_eps=have.epsilon("layer_norm_epsilon", 1e-5),
    tie_embeddings=have.flag("tie_word_embeddings", True),
    learned_positions=True,
    max_positions=have.integer("n_positions", 1024),
  )
  have.finish()
  return config


def write(config: DecoderConfig) -> dict[str, Any]:
  """Returns the keys of config.json that describe a decoder; the inverse of `read`."""
  first, last = mixers(config)[0], mixers(config)[-1]
  return {
    "vocab_size": config.vocab_size,
    "n_embd": config.width,
    "n_layer": len(config.layers),
    "n_head": first.num_heads,
    "n_inner": dense(config).width,
    "n_positions": config.max_positions,
    "activation_function": dense(config).act,
    "layer_norm_epsilon": config.norm_eps,
    "scale_attn_weights": first.scale != 1.0,
    "scale_attn_by_inverse_layer_idx": first.scale != last.scale,
    "tie_word_embeddings": config.tie_embeddings,
  }


def table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
  """Returns the name table: the tensors of a checkpoint, with the parameters that they hold.

  Checkpoints store the kernels of transformers' Conv1D as [I, O], which is also our layout.
  """
  rows = [
    TensorEntry("embed.table", "transformer.wte.weight"),
    TensorEntry("positions.table", "transformer.wpe.weight"),
    *_norm("norm", "transformer.ln_f"),
  ]
  for index in range(len(config.layers)):
    ours, theirs = f"layers.{index}", f"transformer.h.{index}"
    rows += [*_norm(f"{ours}.mixer_norm", f"{theirs}.ln_1"), *_norm(f"{ours}.mlp_norm", f"{theirs}.ln_2")]
    for place, name in enumerate("qkv"):
      part = Part(place * config.width, (place + 1) * config.width)
      rows += _conv(f"{ours}.mixer.{name}", f"{theirs}.attn.c_attn", part=part)
    rows += _conv(f"{ours}.mixer.o", f"{theirs}.attn.c_proj")
    rows += [*_conv(f"{ours}.mlp.up", f"{theirs}.mlp.c_fc"), *_conv(f"{ours}.mlp.down", f"{theirs}.mlp.c_proj")]
  return tuple(rows if config.tie_embeddings else [*rows, *linear("head", "lm_head")])


def _norm(ours: str, theirs: str) -> list[TensorEntry]:
  return [TensorEntry(f"{ours}.scale", f"{theirs}.weight"), TensorEntry(f"{ours}.bias", f"{theirs}.bias")]


def _conv(ours: str, theirs: str, *, part: Part | None = None) -> list[TensorEntry]:
  return [
    TensorEntry(f"{ours}.kernel", f"{theirs}.weight", part=part),
    TensorEntry(f"{ours}.bias", f"{theirs}.bias", part=part),
  ]


FAMILY = Family(
  name="gpt2",
  architecture="GPT2LMHeadModel",
  read=read,
  write=write,
  table=table,
)
