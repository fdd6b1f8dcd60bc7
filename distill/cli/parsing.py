"""Parses the flags of a command and formats its help text."""

import sys
from collections.abc import Sequence

from absl import flags

from distill.errors import InputError


def parse(values: flags.FlagValues, arguments: Sequence[str], *, positional: Sequence[str] = ()) -> list[str]:
  """Parses flags, and returns the arguments that are not flags.

  Args:
    values: Flags of the command; parsing sets their values.
    arguments: Arguments after the name of the command.
    positional: Names of the arguments that are not flags; all are required.

  Raises:
    InputError: A required flag or argument is missing, or there is an argument too many.
    flags.Error: A flag is unknown or its value is wrong.
  """
  try:
    rest = values([sys.argv[0], *arguments])[1:]
  except flags.IllegalFlagValueError as error:
    missing = _missing(values) if values.is_parsed() else []
    if missing:
      raise InputError(f"{', '.join(missing)}: missing, but required; --help lists the flags") from error
    raise
  if len(rest) > len(positional):
    extra = rest[len(positional)]
    raise InputError(f"{extra!r}: unexpected argument; write flags as --flag=value (--help lists them)")
  if len(rest) < len(positional):
    raise InputError(f"{positional[len(rest)]}: this argument is missing, but required; --help lists the flags")
  return rest


def help_text(values: flags.FlagValues) -> str:
  """Returns the help of a command: a line for each flag, required ones first."""
  missing = _missing(values)
  lines = []
  for name in sorted(values, key=lambda name: (f"--{name}" not in missing, name)):
    flag = values[name]
    note = "required" if f"--{name}" in missing else f"default {flag.default}" if flag.default not in ("", []) else ""
    lines.append(f"\n  --{name:<19}{flag.help}{f' ({note})' if note else ''}")
  return "".join(lines)


def _missing(values: flags.FlagValues) -> list[str]:
  """Returns the required flags that have no value."""
  return [f"--{name}" for name in sorted(values) if values[name].value is None]
