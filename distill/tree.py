"""Parameters as flat dictionaries from dotted names to arrays, and regex rules that give each name a value."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx

from distill.errors import InputError

Params = dict[str, Any]


def flatten(state: nnx.State) -> Params:
  """Returns a dictionary from dotted names to arrays, with every variable of an nnx state."""
  return {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def unflatten(state: nnx.State, params: Mapping[str, Any]) -> nnx.State:
  """Returns `state` with the values of `params`; both must hold the same names."""
  flat = [(path, variable.replace(params[".".join(map(str, path))])) for path, variable in nnx.to_flat_state(state)]
  return nnx.from_flat_state(flat)


def first_match(rules: Sequence[tuple[str, Any]], name: str, *, what: str) -> Any:
  """Returns the value of the first rule whose regex matches the whole `name`.

  Args:
    rules: Ordered (regex, value) pairs.
    name: Name of a parameter.
    what: Key of the rules in the recipe; error messages begin with it.

  Raises:
    InputError: No rule matches the name.
  """
  for pattern, value in rules:
    if re.fullmatch(pattern, name):
      return value
  raise InputError(
    f"{what}: no rule covers the parameter {name!r}; end the list with a rule ('.*', …), which matches all names"
  )


def select(params: Mapping[str, Any], keep: Callable[[str], bool]) -> tuple[Params, Params]:
  """Splits `params`: returns (the parameters whose names `keep` accepts, the others)."""
  chosen = {name: value for name, value in params.items() if keep(name)}
  rest = {name: value for name, value in params.items() if name not in chosen}
  return chosen, rest
