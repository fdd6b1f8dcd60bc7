"""Parsing names missing and unexpected flags, and the help lists required flags first."""

import pytest
from absl import flags

from distill.cli.parsing import help_text, parse
from distill.errors import InputError


@pytest.fixture
def values():
  values = flags.FlagValues()
  flags.DEFINE_string("model", None, "A model.", required=True, flag_values=values)
  flags.DEFINE_integer("count", 3, "A count.", flag_values=values)
  return values


def test_flags_get_their_values_and_positional_arguments_are_returned(values):
  assert parse(values, ["--model=a", "DIR", "--count=5"], positional=["DIR"]) == ["DIR"]
  assert (values.model, values.count) == ("a", 5)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--count=5"], "--model: missing, but required; --help lists the flags"),
    (["--model=a", "x"], "'x': unexpected argument; write flags as --flag=value (--help lists them)"),
  ],
)
def test_the_error_for_a_missing_flag_or_an_extra_argument_names_it(values, arguments, message):
  with pytest.raises(InputError) as error:
    parse(values, arguments)
  assert str(error.value) == message


def test_the_error_for_a_missing_positional_argument_names_it(values):
  with pytest.raises(InputError, match="DIR: this argument is missing"):
    parse(values, ["--model=a"], positional=["DIR"])


def test_a_flag_value_of_the_wrong_type_is_refused(values):
  with pytest.raises(flags.Error, match="count"):
    parse(values, ["--model=a", "--count=many"])


def test_help_lists_required_flags_first(values):
  lines = [line.strip() for line in help_text(values).splitlines() if line.strip()]
  assert lines == ["--model              A model. (required)", "--count              A count. (default 3)"]
