"""Reads and writes config.json of Hugging Face models, and names the tensors that a checkpoint must have."""

import pathlib
from collections.abc import Mapping
from typing import Any

import transformers

from distill.checkpoints.name_table import TensorEntry
from distill.checkpoints.registry import FAMILIES
from distill.errors import InputError
from distill.files.json_file import read_json
from distill.models.config import DecoderConfig
from distill.models.decoder import Decoder


def read_config(directory: pathlib.Path) -> DecoderConfig:
  """Reads the config.json of a model directory.

  Raises:
    InputError: The file is missing or damaged, or describes a model that is not supported.
  """
  path = pathlib.Path(directory) / "config.json"
  return config_from_dict(read_json(path), where=str(path))


def config_from_dict(values: Mapping[str, Any], *, where: str) -> DecoderConfig:
  """Returns the decoder configuration that the keys of a config.json describe; error messages begin with `where`.

  Raises:
    InputError: `model_type` is unknown, or another key is missing, unknown or not supported.
  """
  name = values.get("model_type")
  if not isinstance(name, str) or name not in FAMILIES:
    raise InputError(f"{where}: model_type {str(name)[:60]!r} is not supported; expected one of {', '.join(FAMILIES)}")
  try:
    return FAMILIES[name].read(values, where=where)
  except InputError:
    raise
  except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
    # `Attributes` checks most values; a family computes with the others unchecked.
    raise InputError(
      f"{where}: a value is of the wrong kind or size ({error}); compare the file with the original"
    ) from error


def config_to_dict(config: DecoderConfig) -> dict[str, Any]:
  """Returns the keys of config.json that describe the architecture; the inverse of `config_from_dict`.

  Raises:
    InputError: The family's config.json cannot express the configuration.
  """
  return {"model_type": config.family, **FAMILIES[config.family].write(config)}


def check_writable(config: DecoderConfig, *, where: str) -> None:
  """Refuses a configuration that cannot be exported, before work is spent on it.

  Raises:
    InputError: The family's config.json cannot express the configuration; the message begins with `where`.
  """
  try:
    config_to_dict(config)
  except InputError as error:
    raise InputError(f"{where}: {error}") from error


def who_loads(config: DecoderConfig) -> str:
  """Returns a phrase for messages: which library can load an exported model with this configuration."""
  name = FAMILIES[config.family].architecture
  if name in dir(transformers):  # hasattr would import the class.
    return f"transformers.{name} loads it"
  return f"distill alone loads it: transformers {transformers.__version__} has no {name}"


def name_table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
  """Returns the tensors of a checkpoint with this configuration, with the canonical parameters that they hold.

  Each entry pairs one parameter, or a piece of one, with its tensor, so a tensor that holds several parameters has
  several entries.
  """
  return FAMILIES[config.family].table(config)


def shapes(config: DecoderConfig, *, where: str = "config.json") -> dict[str, tuple[int, ...]]:
  """Returns the shape of every canonical parameter.

  Raises:
    InputError: The sizes are larger than arrays can be, or do not fit each other; `where` names the file.
  """
  try:
    decoder = Decoder(config)
  except (TypeError, ValueError, ArithmeticError) as error:
    raise InputError(
      f"{where}: the sizes in this file give no valid model ({error}); compare the file with the original"
    ) from error
  cut = {name: x.shape[name.startswith("groups.") :] for name, x in decoder.abstract().items()}
  return {one: tuple(shape) for name, shape in cut.items() for one in decoder.canonical(name)}
