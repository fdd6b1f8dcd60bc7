"""Mamba-2: state-space mixers without MLPs."""

from collections.abc import Mapping
from typing import Any

from distill.checkpoints.attributes import Attributes
from distill.checkpoints.families.common import linear
from distill.checkpoints.families.state_space import PLAIN, kinds, mixer, read_mixer, write_mixer
from distill.checkpoints.family import Family
from distill.checkpoints.name_table import TensorEntry
from distill.models.config import DecoderConfig, LayerConfig
from distill.nn.mamba2 import Mamba2Config

# Initialisation, chunks of the kernels, and the dtype of the residual stream: none changes the function.
_IGNORED = """
  time_step_rank time_step_min time_step_max time_step_floor time_step_scale time_step_init_scheme
  rescale_prenorm_residual residual_in_fp32 chunk_size norm_before_gate use_mambapy
"""
# The state has a fixed size, so there is no longest sequence.
_POSITIONS = 2**31 - 1


def read(values: Mapping[str, Any], *, where: str) -> DecoderConfig:
  """Returns the decoder configuration that the keys of a config.json describe.

  Raises:
    InputError: A key is missing, unknown or not supported; the message begins with `where`, the file's name.
  """
  have = Attributes(values, where=where)
  have.only("hidden_act", ("silu",))
  have.only("rms_norm", (True,))
  # The gate comes before the norm in transformers, whatever norm_before_gate says.
  have.ignore(*_IGNORED.split())
  spec = read_mixer(have, PLAIN, defaults={"num_heads": 128, "head_dim": 64, "state_size": 128, "num_groups": 8})
  have.only("intermediate_size", (spec.num_heads * spec.head_dim,))
  config = DecoderConfig(
    family="mamba2",
    vocab_size=have.integer("vocab_size"),
    width=have.integer("hidden_size"),
    layers=(LayerConfig(mixer=spec, mlp=None),) * have.integer("num_hidden_layers"),
    norm_eps=have.epsilon("layer_norm_epsilon", 1e-5),
    tie_embeddings=have.flag("tie_word_embeddings"),
    max_positions=_POSITIONS,
  )
  have.finish()
  return config


def write(config: DecoderConfig) -> dict[str, Any]:
  """Returns the keys of config.json that describe a decoder; the inverse of `read`.

  Raises:
    InputError: The width of the Mamba-2 mixer is not a multiple of the model's width.
  """
  return {
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "num_hidden_layers": len(config.layers),
    **write_mixer(kinds(config)[1], PLAIN, width=config.width),
    "hidden_act": "silu",
    "layer_norm_epsilon": config.norm_eps,
    "tie_word_embeddings": config.tie_embeddings,
  }


def table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
  """Returns the name table: the tensors of a checkpoint, with the parameters that they hold."""
  rows = [TensorEntry("embed.table", "backbone.embeddings.weight"), TensorEntry("norm.scale", "backbone.norm_f.weight")]
  for index, layer in enumerate(config.layers):
    assert isinstance(layer.mixer, Mamba2Config), layer.mixer
    ours, theirs = f"layers.{index}", f"backbone.layers.{index}"
    rows.append(TensorEntry(f"{ours}.mixer_norm.scale", f"{theirs}.norm.weight"))
    rows += mixer(f"{ours}.mixer", f"{theirs}.mixer", spec=layer.mixer)
  return tuple(rows if config.tie_embeddings else [*rows, *linear("head", "lm_head")])


FAMILY = Family(
  name="mamba2",
  architecture="Mamba2ForCausalLM",
  read=read,
  write=write,
  table=table,
)
