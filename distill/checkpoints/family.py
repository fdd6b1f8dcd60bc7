"""One Hugging Face model family as a value: everything that its checkpoints need beyond the decoder itself."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from distill.checkpoints.name_table import TensorEntry
from distill.models.config import DecoderConfig


class ReadConfig(Protocol):
  """Reads the keys of a config.json.

  Raises:
    InputError: A key is missing, unknown or not supported; the message begins with `where`, the file's name.
  """

  def __call__(self, values: Mapping[str, Any], *, where: str) -> DecoderConfig: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """A Hugging Face model family.

  Attributes:
    name: `model_type` in config.json, and `DecoderConfig.family`.
    architecture: The class in transformers that loads it, as in `architectures` of config.json.
    read: The keys of a config.json -> our configuration.
    write: The inverse of `read`, without `architectures`, `model_type` and `dtype`. Raises an `InputError` for a
      configuration that config.json cannot express.
    table: The name table: every tensor of a checkpoint, and the parameter that it holds.
    ignored_tensors: Regex for the start of tensor names that checkpoints have and the model does not use.
  """

  name: str
  architecture: str
  read: ReadConfig
  write: Callable[[DecoderConfig], dict[str, Any]]
  table: Callable[[DecoderConfig], tuple[TensorEntry, ...]]
  ignored_tensors: str = ""
