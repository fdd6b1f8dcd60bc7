"""One Hugging Face model family as a value: its config.json and the tensor names of its checkpoints."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from distill.checkpoints.name_table import TensorEntry
from distill.models.config import DecoderConfig


class ReadConfig(Protocol):
  """Returns the decoder configuration that the keys of a config.json describe.

  Families implement this protocol as a function `read(values, where=...)`.

  Raises:
    InputError: A key is missing, unknown or not supported; the message begins with `where`, the file's name.
  """

  def __call__(self, values: Mapping[str, Any], *, where: str) -> DecoderConfig: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """A Hugging Face model family.

  Attributes:
    name: `model_type` in config.json, and `DecoderConfig.family`.
    architecture: Name of the class in transformers that loads it, as in `architectures` of config.json.
    read: Function from the keys of a config.json to the decoder configuration.
    write: Function from the decoder configuration to the keys of config.json, without `architectures`, `model_type`
      and `dtype`; the inverse of `read`. It raises an `InputError` if config.json cannot express the configuration.
    table: Function that returns the name table: every tensor of a checkpoint, and the parameter that it holds.
    ignored_tensors: Regex for the start of tensor names that checkpoints have and the model does not use.
  """

  name: str
  architecture: str
  read: ReadConfig
  write: Callable[[DecoderConfig], dict[str, Any]]
  table: Callable[[DecoderConfig], tuple[TensorEntry, ...]]
  ignored_tensors: str = ""
