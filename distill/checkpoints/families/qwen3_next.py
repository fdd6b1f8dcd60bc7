"""Qwen 3 Next: gated delta rule and gated attention, with mixtures of experts and a shared expert."""

from collections.abc import Mapping
from typing import Any

from distill.checkpoints.attributes import Attributes
from distill.checkpoints.families.common import attention, decoder, frame, norms
from distill.checkpoints.families.qwen3_5 import IGNORED_TENSORS, delta, hybrid, written_hybrid
from distill.checkpoints.families.qwen3_moe import sparse, sparse_mlp, written_sparse
from distill.checkpoints.family import Family
from distill.checkpoints.name_table import TensorEntry
from distill.models.config import DecoderConfig, LayerConfig
from distill.nn.attention import AttentionConfig
from distill.nn.gated_delta import GatedDeltaConfig
from distill.nn.moe import MoeConfig


def read(values: Mapping[str, Any], *, where: str) -> DecoderConfig:
  """Returns the decoder configuration that the keys of a config.json describe.

  Raises:
    InputError: A key is missing, unknown or not supported; the message begins with `where`, the file's name.
  """
  have = Attributes(values, where=where)
  mixers = hybrid(have, kv=2)
  count, top_k = have.experts(512, chosen=10)
  mixture = MoeConfig(
    width=have.integer("moe_intermediate_size", 512),
    num_experts=count,
    top_k=top_k,
    renormalise=have.flag("norm_topk_prob", True),
    shared=have.integer("shared_expert_intermediate_size", 512),
    shared_gated=True,
  )
  mlps = sparse(have, mixture=mixture, width=5632)
  layers = [LayerConfig(mixer=mixer, mlp=mlp) for mixer, mlp in zip(mixers, mlps, strict=True)]
  return decoder(have, family="qwen3_next", layers=layers, norm_offset=1.0)


def write(config: DecoderConfig) -> dict[str, Any]:
  """Returns the keys of config.json that describe a decoder; the inverse of `read`.

  Raises:
    InputError: All layers have the same type of attention, which config.json cannot express.
  """
  shared = next((x.mlp.shared for x in config.layers if isinstance(x.mlp, MoeConfig)), None)
  fields = {} if shared is None else {"shared_expert_intermediate_size": shared}
  return {**written_hybrid(config), **written_sparse(config), **fields}


def table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
  """Returns the name table: the tensors of a checkpoint, with the parameters that they hold."""
  rows = frame(config)
  for index, layer in enumerate(config.layers):
    rows += [*norms(index, config=config), *sparse_mlp(index, spec=layer.mlp)]
    if isinstance(layer.mixer, AttentionConfig):
      rows += attention(index, spec=layer.mixer)
    elif isinstance(layer.mixer, GatedDeltaConfig):
      rows += delta(index, spec=layer.mixer, interleaved=True)
  return tuple(rows)


FAMILY = Family(
  name="qwen3_next",
  architecture="Qwen3NextForCausalLM",
  read=read,
  write=write,
  table=table,
  ignored_tensors=IGNORED_TENSORS,
)
