"""Configuration files of the form FILE.py[:variant], and overrides --config.path.to.key=value."""

import ast
import difflib
import importlib.util
import inspect
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from distill.errors import InputError
from distill.jobs.config import resolve

_PREFIX = "--config."


def split(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
  """(the other arguments, overrides by dotted key).

  Raises:
    InputError: An override without a value.
  """
  rest, overrides = [], {}
  for argument in arguments:
    if argument.startswith(_PREFIX):
      key, equals, value = argument[len(_PREFIX) :].partition("=")
      if not equals:
        raise InputError(f"{argument}: an override needs a value, as in {argument}=VALUE")
      overrides[key] = value
    else:
      rest.append(argument)
  return rest, overrides


def load(name: str, *, overrides: dict[str, str]) -> dict[str, Any]:
  """The resolved configuration of FILE.py[:variant] with overrides.

  Raises:
    InputError: The file cannot be run, has no get_config, or a key is unknown or of the wrong type.
  """
  file, colon, variant = name.partition(":")
  path = pathlib.Path(file)
  if not path.is_file():
    raise InputError(f"{path}: no such file; --config needs FILE.py or FILE.py:variant")
  try:
    spec = importlib.util.spec_from_file_location("distill_config", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    wants = len(inspect.signature(module.get_config).parameters)
    config = module.get_config(variant) if wants and (colon or not _optional(module)) else module.get_config()
  except InputError:
    raise
  except Exception as error:
    raise InputError(f"{name}: {type(error).__name__}: {error}") from error
  if not isinstance(config, Mapping | ConfigDict):
    raise InputError(f"{name}: get_config returned {type(config).__name__}, not a ConfigDict")
  locked = ConfigDict(resolve(config)).lock()
  for key, text in overrides.items():
    _override(locked, key, text)
  return resolve(locked)


def _optional(module: Any) -> bool:
  (parameter, *_) = inspect.signature(module.get_config).parameters.values()
  return parameter.default is not inspect.Parameter.empty


def _override(config: ConfigDict, key: str, text: str) -> None:
  *parents, last = key.split(".")
  node: Any = config
  for depth, name in enumerate([*parents, last]):
    if not isinstance(node, ConfigDict) or name not in node:
      where = ".".join(["config", *parents[:depth]])
      near = difflib.get_close_matches(name, list(node) if isinstance(node, ConfigDict) else [], n=1)
      hint = f"did you mean {near[0]}?" if near else "it is not in the configuration"
      raise InputError(f"--config.{key}: {where} has no key {name!r}; {hint}")
    if depth < len(parents):
      node = node[name]
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text
  try:
    if (_scheduled(node[last]) and _scheduled(value)) or key == "student.layers_from":
      with node.ignore_type():
        node[last] = value
    else:
      node[last] = value
  except TypeError as error:
    raise InputError(f"--config.{key}={text}: expected {type(node[last]).__name__}") from error


def _scheduled(value: Any) -> bool:
  """Whether a value is a number or a schedule, which stand for one another."""
  return isinstance(value, int | float) or (isinstance(value, dict | ConfigDict) and "kind" in value)
