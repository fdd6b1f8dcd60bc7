"""Typed configuration: frozen dataclasses, read once from the nested mappings that recipes return.

A package declares its settings as a frozen dataclass whose fields are made by `option`. `read` checks a mapping against
it; nothing deeper in the code indexes a nested dict.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from distill.errors import InputError

Config = TypeVar("Config")
_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}


def option(
  default: Any = dataclasses.MISSING,
  *,
  help: str,
  least: float | None = None,
  above: float | None = None,
  most: float | None = None,
  choices: Sequence[str] = (),
  regex: bool = False,
  kinds: Mapping[str, type] | None = None,
) -> Any:
  """Declares one field of a configuration dataclass.

  Limits hold for every number in the value, also for those inside lists.

  Args:
    default: Value if a recipe leaves the key out; a dataclass type means that dataclass with all its defaults.
      Without a default the key is required.
    help: One sentence for docs/config.md.
    least: Smallest number allowed.
    above: Numbers must be greater than this.
    most: Largest number allowed.
    choices: The only strings allowed; empty allows all.
    regex: True if strings must be valid regular expressions.
    kinds: For a value that is a dict with the key `kind`: kind -> dataclass that the dict is read into. The field is
      annotated with the base class of these dataclasses.
  """
  metadata: dict[str, Any] = {"help": help, "least": least, "above": above, "most": most}
  metadata |= {"choices": tuple(choices), "regex": regex, "kinds": kinds}
  if isinstance(default, type):
    return dataclasses.field(default_factory=default, metadata=metadata)
  return dataclasses.field(default=default, metadata=metadata)


def read(cls: type[Config], given: Any, *, key: str) -> Config:
  """Returns the dataclass `cls` with the values of a mapping, each checked against its annotation and its `option`.

  Args:
    cls: A frozen dataclass whose fields are made by `option`. Nested dataclasses and tuples of them are read as well.
    given: Mapping from field names to values; an instance of `cls` is returned as it is.
    key: Where the mapping stands in the recipe, for example `config.stages[0].optimizer`; error messages begin with it.

  Raises:
    InputError: A key is missing or unknown, or a value has the wrong type or is out of range.
  """
  if isinstance(given, cls):
    return given
  if not isinstance(given, Mapping):
    raise InputError(f"{key}: got {_shown(given)}; give a dict with {', '.join(_options(cls))}")
  options, hints = _options(cls), typing.get_type_hints(cls)
  for name in given:
    if name not in options:
      raise InputError(f"{key}.{name}: unknown key; {_nearest(str(name), options, key=key)}")
  values = {}
  for name, field in options.items():
    if name in given:
      values[name] = _value(given[name], hints[name], options=field.metadata, key=f"{key}.{name}")
    elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
      raise InputError(f"{key}.{name}: this required key is missing; give it a value")
  return cls(**values)


def read_kind(kinds: Mapping[str, type[Config]], given: Any, *, key: str) -> Config:
  """Reads a mapping into the dataclass that its `kind` selects.

  Args:
    kinds: Dataclass of each kind.
    given: Mapping with a `kind`; an instance of one of the dataclasses is returned as it is.
    key: Where the mapping stands in the recipe; error messages begin with it.

  Raises:
    InputError: The kind is unknown, another key is missing or unknown, or a value is wrong.
  """
  for cls in kinds.values():
    if isinstance(given, cls):
      return given
  if not isinstance(given, Mapping):
    raise InputError(f"{key}: got {_shown(given)}; give a dict with a kind")
  kind = given.get("kind")
  if not isinstance(kind, str) or kind not in kinds:
    near = difflib.get_close_matches(str(kind), list(kinds), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(map(repr, kinds))}"
    raise InputError(f"{key}.kind: got {_shown(kind)}; {hint}")
  return read(kinds[kind], given, key=key)


class Description(NamedTuple):
  """The description of one configuration option, for documentation.

  Attributes:
    key: Dotted key in the recipe, such as `config.training.dtype`.
    hint: Type annotation of the field.
    default: Default value, or `dataclasses.MISSING` for a required option and for a nested dataclass.
    help: Sentence that explains the option.
    choices: Allowed strings, or an empty tuple if all are allowed.
  """

  key: str
  hint: Any
  default: Any
  help: str
  choices: tuple[str, ...]


def describe(cls: type, *, key: str = "config") -> Iterator[Description]:
  """Yields every option of a configuration dataclass and of the dataclasses nested in it, depth first.

  Args:
    cls: The configuration dataclass.
    key: Dotted key at which a recipe holds `cls`; the keys of all options begin with it.
  """
  hints = typing.get_type_hints(cls)
  for name, field in _options(cls).items():
    where, hint = f"{key}.{name}", hints[name]
    yield Description(where, hint, field.default, field.metadata["help"], field.metadata["choices"])
    inner = next((one for one in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(one)), None)
    if isinstance(inner, type) and not field.metadata["kinds"]:
      many = typing.get_origin(hint) is tuple
      yield from describe(inner, key=f"{where}.NAME" if _is_named(inner) else f"{where}[i]" if many else where)


def _options(cls: type) -> dict[str, dataclasses.Field]:
  return {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]


def _nearest(name: str, options: Mapping[str, Any], *, key: str) -> str:
  near = difflib.get_close_matches(name, list(options), n=1)
  return f"did you mean {key}.{near[0]}?" if near else f"known: {', '.join(options)}"


def _value(value: Any, hint: Any, *, options: Mapping[str, Any], key: str) -> Any:
  """Returns the value converted to its annotation: an int becomes a float where a float is expected, a list a tuple."""
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    return _one_of(value, arguments, options=options, key=key)
  if origin is tuple:
    return _tuple(value, arguments, options=options, key=key)
  if dataclasses.is_dataclass(hint) and isinstance(hint, type):
    return read_kind(options["kinds"], value, key=key) if options["kinds"] else read(hint, value, key=key)
  if origin is not None and issubclass(origin, Mapping):
    if not isinstance(value, Mapping):
      raise InputError(f"{key}: got {_shown(value)}; give a dict")
    return dict(value)
  if hint is Any:
    return value
  if not _is(value, hint):
    raise InputError(f"{key}: got {_shown(value)}; use {_expected(hint, options)}")
  return _in_range(float(value) if hint is float else value, hint, options=options, key=key)


def _one_of(value: Any, hints: Sequence[Any], *, options: Mapping[str, Any], key: str) -> Any:
  """Reads `value` as the first member of a union, listed in `hints`, whose type the value has.

  Raises:
    InputError: The value has none of these types, or is out of range.
  """
  for hint in hints:
    if hint is type(None) and value is None:
      return None
    if _fits(value, hint):
      return _value(value, hint, options=options, key=key)
  expected = " or ".join(_expected(hint, options) for hint in hints)
  raise InputError(f"{key}: got {_shown(value)}; use {expected}")


def _tuple(value: Any, arguments: Sequence[Any], *, options: Mapping[str, Any], key: str) -> tuple[Any, ...]:
  if isinstance(value, Mapping) and _is_named(arguments[0]):
    listed = ", ".join(f"{{'name': {name!r}, …}}" for name in value)
    raise InputError(f"{key}: got a dict, but the order of the elements matters; give a list: [{listed}]")
  if not isinstance(value, list | tuple):
    raise InputError(f"{key}: got {_shown(value)}; give a list")
  if len(arguments) == 2 and arguments[1] is Ellipsis:
    keys = _element_keys(value, arguments[0], key=key)
    return tuple(_value(one, arguments[0], options=options, key=where) for one, where in zip(value, keys, strict=True))
  if len(value) != len(arguments):
    raise InputError(f"{key}: got {_shown(value)}; give a list of {len(arguments)} values")
  pairs = zip(value, arguments, strict=True)
  return tuple(_value(one, hint, options=options, key=f"{key}[{i}]") for i, (one, hint) in enumerate(pairs))


def _element_keys(values: Sequence[Any], hint: Any, *, key: str) -> list[str]:
  """Returns the place of each list element in the recipe: `key[index]`, or `key.name` if elements must have a name.

  Raises:
    InputError: Two elements have the same name.
  """
  if not _is_named(hint):
    return [f"{key}[{i}]" for i in range(len(values))]
  names = [_name(one) for one in values]
  for i, name in enumerate(names):
    if name and name in names[:i]:
      raise InputError(f"{key}[{i}].name: {name!r} is already the name of another element; choose a different name")
  return [f"{key}.{name}" if name else f"{key}[{i}]" for i, name in enumerate(names)]


def _is_named(hint: Any) -> bool:
  """Returns True if `hint` is a dataclass with a required field `name`.

  List elements of such a type are addressed by their name, others by their index.
  """
  if not dataclasses.is_dataclass(hint) or not isinstance(hint, type):
    return False
  name = _options(hint).get("name")
  return name is not None and name.default is dataclasses.MISSING


def _name(value: Any) -> str:
  name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", "")
  return name if isinstance(name, str) else ""


def _fits(value: Any, hint: Any) -> bool:
  origin = typing.get_origin(hint)
  if origin is tuple:
    return isinstance(value, list | tuple)
  if dataclasses.is_dataclass(hint) or (isinstance(origin, type) and issubclass(origin, Mapping)):
    return isinstance(value, Mapping) or (isinstance(hint, type) and isinstance(value, hint))
  return hint is Any or (isinstance(hint, type) and _is(value, hint))


def _is(value: Any, hint: type) -> bool:
  """Returns True if a value has the type `hint`; a bool is not a number, and an int also counts as a float."""
  if isinstance(value, bool):
    return hint is bool
  return isinstance(value, int | float) if hint is float else isinstance(value, hint)


def _in_range(value: Any, hint: Any, *, options: Mapping[str, Any], key: str) -> Any:
  least, above, most, choices = (options[name] for name in ("least", "above", "most", "choices"))
  if hint in (int, float):
    outside = not math.isfinite(value)
    outside = outside or (least is not None and value < least) or (most is not None and value > most)
    if outside or (above is not None and value <= above):
      raise InputError(f"{key}: got {value!r}; use {_expected(hint, options)}")
  if hint is str and choices and value not in choices:
    raise InputError(f"{key}: got {_shown(value)}; use one of {', '.join(map(repr, choices))}")
  if hint is str and options["regex"]:
    try:
      re.compile(value)
    except re.error as error:
      raise InputError(f"{key}: {_shown(value)} is not a valid regular expression ({error}); correct it") from error
  return value


def _expected(hint: Any, options: Mapping[str, Any]) -> str:
  """Returns a description of the values that an option takes, for error messages."""
  if hint is type(None):
    return "None"
  if typing.get_origin(hint) is tuple:
    return "a list"
  if hint not in _NAMES:
    return "a dict"
  if hint is str and options["choices"]:
    return f"one of {', '.join(map(repr, options['choices']))}"
  limits = [("of at least", "least"), ("above", "above"), ("of at most", "most")]
  said = [f"{words} {options[name]:g}" for words, name in limits if options[name] is not None and hint in (int, float)]
  return " ".join([_NAMES[hint], " and ".join(said)]).strip()


def _shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f"{text[:57]}..."
