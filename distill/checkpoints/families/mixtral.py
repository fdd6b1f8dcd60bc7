"""Mixtral: Mistral with mixtures of experts."""

from collections.abc import Mapping
from typing import Any

from distill.checkpoints.attributes import Attributes
from distill.checkpoints.families.common import (
  attention,
  decoder,
  experts,
  frame,
  heads,
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
from distill.nn.moe import MoeConfig

_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}


def read(values: Mapping[str, Any], *, where: str) -> DecoderConfig:
  """Returns the decoder configuration that the keys of a config.json describe.

  Raises:
    InputError: A key is missing, unknown or not supported; the message begins with `where`, the file's name.
  """
  have = Attributes(values, where=where)
  sizes = heads(have, kv=8)
  mixer = AttentionConfig(**sizes, rope=read_rope(have, head_dim=sizes["head_dim"], theta=1e6), window=window(have))
  count, top_k = have.experts(8, chosen=2)
  mlp = MoeConfig(
    width=have.integer("intermediate_size"),
    num_experts=count,
    top_k=top_k,
    act=have.activation(),
  )
  layers = (LayerConfig(mixer=mixer, mlp=mlp),) * have.integer("num_hidden_layers")
  return decoder(have, family="mixtral", layers=layers, norm_eps=1e-5)


def write(config: DecoderConfig) -> dict[str, Any]:
  """Returns the keys of config.json that describe a decoder; the inverse of `read`."""
  mlp = config.layers[0].mlp
  assert isinstance(mlp, MoeConfig), mlp
  mixed = {"num_local_experts": mlp.num_experts, "num_experts_per_tok": mlp.top_k}
  return {**written(config), "sliding_window": mixers(config)[0].window, **mixed}


def table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
  """Returns the name table: the tensors of a checkpoint, with the parameters that they hold."""
  rows = frame(config)
  for index, (layer, mixer) in enumerate(zip(config.layers, mixers(config), strict=True)):
    assert isinstance(layer.mlp, MoeConfig), layer.mlp
    rows += [*norms(index, config=config), *attention(index, spec=mixer)]
    rows += experts(index, spec=layer.mlp, block="block_sparse_moe", names=_NAMES)
  return tuple(rows)


FAMILY = Family(
  name="mixtral",
  architecture="MixtralForCausalLM",
  read=read,
  write=write,
  table=table,
)
