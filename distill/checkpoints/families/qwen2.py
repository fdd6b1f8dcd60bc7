"""Qwen 2 and 2.5: biases on queries, keys and values; sliding windows on the layers from `max_window_layers` on."""

from collections.abc import Mapping
from typing import Any

from distill.checkpoints.attributes import Attributes
from distill.checkpoints.families.common import (
  FULL,
  SLIDING,
  decoder,
  dense_table,
  heads,
  window,
  windowed,
  written,
  written_windows,
)
from distill.checkpoints.families.ropes import read_rope
from distill.checkpoints.family import Family
from distill.models.config import DecoderConfig, LayerConfig
from distill.nn.attention import AttentionConfig
from distill.nn.mlp import MlpConfig


def read(values: Mapping[str, Any], *, where: str) -> DecoderConfig:
  """Returns the decoder configuration that the keys of a config.json describe.

  Raises:
    InputError: A key is missing, unknown or not supported; the message begins with `where`, the file's name.
  """
  have = Attributes(values, where=where)
  have.only("use_mrope", (False,))
  sizes = heads(have, kv=32)
  mixer = AttentionConfig(**sizes, rope=read_rope(have, head_dim=sizes["head_dim"]), use_bias=True)
  return decoder(have, family="qwen2", layers=switched_layers(have, mixer=mixer))


def switched_window(have: Attributes) -> int | None:
  """Returns the key `sliding_window` of config.json, in tokens, or None if `use_sliding_window` is false."""
  size = window(have, default=4096)
  return size if have.flag("use_sliding_window") else None


def switched_layers(have: Attributes, *, mixer: AttentionConfig) -> list[LayerConfig]:
  """Returns the layers; those that `layer_types` or `max_window_layers` selects have a sliding window.

  Args:
    have: The keys of config.json.
    mixer: Attention of the layers without a window; the others differ from it only by their window.

  Raises:
    InputError: A key is missing or not supported.
  """
  size, first = switched_window(have), have.number("max_window_layers", 28)
  default = [SLIDING if size is not None and i >= first else FULL for i in range(have.integer("num_hidden_layers"))]
  mlp = MlpConfig(width=have.integer("intermediate_size"), act=have.activation())
  return windowed(have, default, size=size, mixer=mixer, mlp=mlp)


def write(config: DecoderConfig) -> dict[str, Any]:
  """Returns the keys of config.json that describe a decoder; the inverse of `read`."""
  kinds = written_windows(config)
  return {**written(config), **kinds, "use_sliding_window": kinds["sliding_window"] is not None}


FAMILY = Family(
  name="qwen2",
  architecture="Qwen2ForCausalLM",
  read=read,
  write=write,
  table=dense_table,
)
