"""Loads recipes named FILE.py[:variant], and applies overrides --config.path.to.key=value to them."""

import ast
import difflib
import importlib.util
import inspect
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from distill.errors import InputError
from distill.jobs.config import RunConfig, plain, resolve

_PREFIX = "--config."


def split(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
  """Splits a command line into (other arguments, {dotted key: text} of overrides).

  Raises:
    InputError: An override has no value.
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


def load(name: str, *, overrides: dict[str, str]) -> RunConfig:
  """Runs the recipe FILE.py[:variant], and returns its configuration with overrides applied.

  Args:
    name: The recipe's file, with its variant if it takes one.
    overrides: Dotted key -> new value as text, from `split`; a Python literal such as 0.5 or (1, 2) is evaluated.

  Raises:
    InputError: The file cannot be run, has no get_config, or a key or a value is wrong.
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
    raise InputError(f"{name}: the recipe raises {type(error).__name__}: {error}; correct the file") from error
  if not isinstance(config, Mapping | ConfigDict):
    raise InputError(f"{name}: get_config returned {type(config).__name__}; return a ConfigDict or a dict")
  recipe = plain(config)
  for key, text in overrides.items():
    recipe = _override(recipe, key.split("."), _literal(text), key=f"{_PREFIX}{key}")
  return resolve(recipe)


def _optional(module: Any) -> bool:
  (parameter, *_) = inspect.signature(module.get_config).parameters.values()
  return parameter.default is not inspect.Parameter.empty


def _literal(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def _override(value: Any, path: Sequence[str], new: Any, *, key: str) -> Any:
  """Returns `value`, a recipe or a part of one, with what is at `path` replaced by `new`.

  A part of the path names a key of a dict, or an element of a list by its `name` or its index.

  Raises:
    InputError: The path leads into a value that is neither a dict nor a list, or names an element that the list lacks.
      The message begins with `key`, the flag of the override.
  """
  if not path:
    return new
  name, *rest = path
  if value is None or isinstance(value, Mapping):
    found = dict(value or {})
    return {**found, name: _override(found.get(name), rest, new, key=key)}
  if not isinstance(value, list | tuple):
    raise InputError(f"{key}: {value!r} is neither a dict nor a list, so it has no {name!r}; correct the key")
  names = [one.get("name") if isinstance(one, Mapping) else None for one in value]
  known = [one for one in names if isinstance(one, str)] or list(map(str, range(len(value))))
  if name in names:
    place = names.index(name)
  elif name.isdigit() and int(name) < len(value):
    place = int(name)
  else:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
    raise InputError(f"{key}: the list has no element {name!r}; {hint}")
  changed = list(value)
  changed[place] = _override(value[place], rest, new, key=key)
  return tuple(changed)
