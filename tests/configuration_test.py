"""A mapping is read into a typed dataclass, or refused by one line that names the key and says what to use."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest

from distill.configuration import describe, option, read
from distill.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
  """Options of a nested section."""

  rate: float | Mapping[str, Any] = option(1.0, help="A number or a schedule.", least=0.0)
  kind: str = option("a", help="One of two.", choices=("a", "b"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
  """Options of every supported type."""

  steps: int = option(help="A count.", least=1)
  name: str = option("", help="A text.")
  on: bool = option(False, help="A switch.")
  layers: tuple[int, ...] | str = option((), help="Numbers or a word.")
  rules: tuple[tuple[str, float], ...] = option((), help="Pairs.")
  inner: Inner = option(Inner, help="A dataclass.")
  many: tuple[Inner, ...] = option((), help="Dataclasses.")
  model: Mapping[str, Any] | None = option(None, help="Free-form.")


def test_option_values_are_converted_to_the_types_of_their_annotations():
  outer = read(Outer, {"steps": 2, "rules": [["x", 1]], "many": [{"rate": 3}], "layers": [1, 2]}, key="config")
  assert outer.rules == (("x", 1.0),) and type(outer.rules[0][1]) is float
  assert outer.many == (Inner(rate=3.0),) and outer.inner == Inner() and outer.layers == (1, 2)
  assert read(Outer, {"steps": 2, "layers": "importance"}, key="config").layers == "importance"
  assert read(Outer, outer, key="config") is outer


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({}, "config.steps: this required key is missing; give it a value"),
    ({"steps": 0}, "config.steps: got 0; use a whole number of at least 1"),
    ({"steps": True}, "config.steps: got True; use a whole number of at least 1"),
    ({"steps": 2.0}, "config.steps: got 2.0; use a whole number of at least 1"),
    ({"steps": 2, "on": 1}, "config.on: got 1; use True or False"),
    ({"steps": 2, "nam": ""}, "config.nam: unknown key; did you mean config.name?"),
    ({"steps": 2, "inner": {"kind": "c"}}, "config.inner.kind: got 'c'; use one of 'a', 'b'"),
    ({"steps": 2, "inner": {"rate": float("nan")}}, "config.inner.rate: got nan; use a number of at least 0"),
    ({"steps": 2, "inner": {"rate": "1"}}, "config.inner.rate: got '1'; use a number of at least 0 or a dict"),
    ({"steps": 2, "many": [{}, {"rate": -1}]}, "config.many[1].rate: got -1.0; use a number of at least 0"),
    ({"steps": 2, "rules": "x"}, "config.rules: got 'x'; give a list"),
    ({"steps": 2, "rules": [("x",)]}, "config.rules[0]: got ('x',); give a list of 2 values"),
    ({"steps": 2, "layers": [1, "a"]}, "config.layers[1]: got 'a'; use a whole number"),
    ({"steps": 2, "model": 3}, "config.model: got 3; use a dict or None"),
    (3, "config: got 3; give a dict with steps, name, on, layers, rules, inner, many, model"),
  ],
)
def test_the_error_for_a_wrong_configuration_value_or_key_names_the_key(given, message):
  with pytest.raises(InputError) as error:
    read(Outer, given, key="config")
  assert str(error.value) == message


def test_describe_yields_nested_options_by_their_dotted_key():
  keys = [key for key, *_ in describe(Outer)]
  assert {"config.steps", "config.inner.rate", "config.many[i].kind"} <= set(keys)
