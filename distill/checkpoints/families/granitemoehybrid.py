"""Granite 4: Mamba-2 mixers, attention on a few layers, the four multipliers of Granite 3, experts and a shared MLP."""

from collections.abc import Mapping
from typing import Any

from distill.checkpoints.attributes import Attributes
from distill.checkpoints.families.common import attention, decoder, frame, heads, linear, norms
from distill.checkpoints.families.phi3 import fused
from distill.checkpoints.families.ropes import read_rope, write_rope
from distill.checkpoints.families.state_space import (
  FULL,
  LINEAR,
  PREFIXED,
  kinds,
  mixer,
  read_mixer,
  write_mixer,
  written_heads,
)
from distill.checkpoints.family import Family
from distill.checkpoints.name_table import TensorEntry
from distill.errors import InputError
from distill.models.config import DecoderConfig, LayerConfig
from distill.nn.attention import AttentionConfig
from distill.nn.mamba2 import Mamba2Config
from distill.nn.mlp import MlpConfig
from distill.nn.moe import MoeConfig

# Names before version 5 of transformers.
_EARLIER = {"mamba": LINEAR, "attention": FULL}


def read(values: Mapping[str, Any], *, where: str) -> DecoderConfig:
  """Returns the decoder configuration that the keys of a config.json describe.

  Raises:
    InputError: A key is missing, unknown or not supported; the message begins with `where`, the file's name.
  """
  have = Attributes(values, where=where)
  have.only("hidden_act", ("silu",))
  have.only("normalization_function", ("rmsnorm",))
  # Initialisation, and chunks of the kernels.
  have.ignore("init_method", "mamba_chunk_size")
  sizes, bias = heads(have), have.flag("attention_bias")
  rope, place = read_rope(have, head_dim=sizes["head_dim"]), have.get("position_embedding_type")
  have.only("position_embedding_type", ("rope", "nope"))
  full = AttentionConfig(
    **sizes,
    rope=rope if place == "rope" else None,
    scale=have.number("attention_multiplier", 1.0),
    use_bias=bias,
    use_out_bias=bias,
  )
  space = read_mixer(have, PREFIXED, defaults={"num_heads": 128, "state_size": 256, "num_groups": 1})
  names = have.one_a_layer(
    "layer_types", [LINEAR] * have.integer("num_hidden_layers"), allowed=(LINEAR, FULL, *_EARLIER)
  )
  mlp = _mlp(have)
  layers = [LayerConfig(mixer=full if _EARLIER.get(x, x) == FULL else space, mlp=mlp) for x in names]
  divisor = have.number("logits_scaling", 1.0)
  if divisor == 0:
    raise InputError(f"{where}: logits_scaling is 0, but the logits are divided by it; give another number")
  return decoder(
    have,
    family="granitemoehybrid",
    layers=layers,
    embed_scale=have.number("embedding_multiplier", 1.0),
    residual_scale=have.number("residual_multiplier", 1.0),
    logit_scale=1.0 / divisor,
  )


def _mlp(have: Attributes) -> MlpConfig | MoeConfig:
  """Returns the configuration of every layer's MLP: experts and a shared MLP or, without experts, the shared MLP."""
  shared, count = have.integer("shared_intermediate_size", 1024), have.get("num_local_experts")
  if type(count) is int and count == 0:
    have.ignore("num_experts_per_tok", "intermediate_size")
    return MlpConfig(width=shared)
  count, top_k = have.experts(8, chosen=2)
  return MoeConfig(width=have.integer("intermediate_size", 11008), num_experts=count, top_k=top_k, shared=shared)


def write(config: DecoderConfig) -> dict[str, Any]:
  """Returns the keys of config.json that describe a decoder; the inverse of `read`.

  Raises:
    InputError: The width of the Mamba-2 mixer is not a multiple of the model's width.
  """
  (full, space), mlp = kinds(config), config.layers[0].mlp
  fields: dict[str, Any] = {}
  if full is not None and full.rope is not None:
    fields = {"position_embedding_type": "rope", "rope_parameters": write_rope(full.rope)}
  if full is not None:
    fields["attention_multiplier"] = full.head_dim**-0.5 if full.scale is None else full.scale
  if isinstance(mlp, MoeConfig):
    fields |= {"num_local_experts": mlp.num_experts, "num_experts_per_tok": mlp.top_k}
    fields |= {"intermediate_size": mlp.width, "shared_intermediate_size": mlp.shared}
  elif isinstance(mlp, MlpConfig):
    fields |= {"num_local_experts": 0, "num_experts_per_tok": 0}
    fields |= {"intermediate_size": mlp.width, "shared_intermediate_size": mlp.width}
  return {
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "num_hidden_layers": len(config.layers),
    "layer_types": [FULL if isinstance(layer.mixer, AttentionConfig) else LINEAR for layer in config.layers],
    **written_heads(full),
    **write_mixer(space, PREFIXED, width=config.width),
    **fields,
    "hidden_act": "silu",
    "embedding_multiplier": config.embed_scale,
    "residual_multiplier": config.residual_scale,
    "logits_scaling": 1.0 / config.logit_scale,
    "max_position_embeddings": config.max_positions,
    "rms_norm_eps": config.norm_eps,
    "tie_word_embeddings": config.tie_embeddings,
  }


def table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
  """Returns the name table: the tensors of a checkpoint, with the parameters that they hold."""
  rows = frame(config)
  for index, layer in enumerate(config.layers):
    ours, theirs = f"layers.{index}", f"model.layers.{index}"
    rows += norms(index, config=config)
    if isinstance(layer.mixer, Mamba2Config):
      rows += mixer(f"{ours}.mixer", f"{theirs}.mamba", spec=layer.mixer)
    elif isinstance(layer.mixer, AttentionConfig):
      rows += attention(index, spec=layer.mixer)
    if isinstance(layer.mlp, MoeConfig):
      assert layer.mlp.shared is not None, layer.mlp
      rows += _experts(f"{ours}.mlp", f"{theirs}.block_sparse_moe", spec=layer.mlp)
      rows += _shared(f"{ours}.mlp.shared", f"{theirs}.shared_mlp", width=layer.mlp.shared)
    elif isinstance(layer.mlp, MlpConfig):
      rows += _shared(f"{ours}.mlp", f"{theirs}.shared_mlp", width=layer.mlp.width)
  return tuple(rows)


def _shared(ours: str, theirs: str, *, width: int) -> list[TensorEntry]:
  """Returns the name-table entries (parameter, tensor) of an MLP whose gate and up projections are concatenated."""
  rows = fused({"gate": width, "up": width}, ours=f"{ours}.{{}}.kernel", theirs=f"{theirs}.input_linear.weight")
  return [*rows, *linear(f"{ours}.down", f"{theirs}.output_linear")]


def _experts(ours: str, theirs: str, *, spec: MoeConfig) -> list[TensorEntry]:
  """Returns the name-table entries (parameter, tensor) of a router and of experts; each tensor holds all experts."""
  return [
    *linear(f"{ours}.router", f"{theirs}.router.layer"),
    *_shared(f"{ours}.experts", theirs, width=spec.width),
  ]


FAMILY = Family(
  name="granitemoehybrid",
  architecture="GraniteMoeHybridForCausalLM",
  read=read,
  write=write,
  table=table,
)
