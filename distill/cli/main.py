"""The command line: finds the command, parses its flags, turns wrong input into one line and exit code 2."""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from absl import flags

from distill.errors import InputError

COMMANDS = {
  "train": "distil a teacher into a student, train an adapter or pretrain, as a configuration says",
  "score": "write logits and hidden states of a model for given tokens",
  "generate": "continue a prompt",
  "compare": "measure a student against its teacher, skill by skill, as a report",
  "export": "write a model as a Hugging Face directory",
  "inspect": "tell what a model, adapter, run or token store is",
}
EXIT_INPUT = 2


def run() -> None:
  """Entry point of the console script."""
  sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
  """Runs one command and returns its exit code."""
  if not arguments or arguments[0] in ("help", "--help", "-h"):
    print("usage: distill COMMAND --flag=value …   (distill COMMAND --help lists the flags)\n")
    print("\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items()))
    return 0
  name, debug = arguments[0], "--debug" in arguments
  rest = [argument for argument in arguments[1:] if argument != "--debug"]
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  try:
    if name not in COMMANDS:
      near = difflib.get_close_matches(name, list(COMMANDS), n=1)
      raise InputError(f"unknown command; {f'did you mean {near[0]}?' if near else 'distill alone lists the commands'}")
    return _command(name, rest)
  except (InputError, flags.Error, OSError) as error:
    if debug:
      raise
    print(f"distill {name}: {' '.join(str(error).split())}", file=sys.stderr)
    return EXIT_INPUT
  except KeyboardInterrupt:
    print(f"distill {name}: interrupted", file=sys.stderr)
    return 130


def _command(name: str, arguments: Sequence[str]) -> int:
  module = importlib.import_module(f"distill.cli.{name}")
  if "--help" in arguments or "-h" in arguments:
    print(f"distill {name}: {COMMANDS[name]}\n{module.FLAGS.module_help(f'distill.cli.{name}')}")
    return 0
  return module.main(arguments)


def parse(values: flags.FlagValues, arguments: Sequence[str], *, positional: int = 0) -> list[str]:
  """Parses `arguments` into `values`; returns the arguments that are not flags.

  Raises:
    InputError: More or fewer of those than `positional`.
  """
  rest = values(["distill", *arguments])[1:]
  if len(rest) != positional:
    what = f"unexpected argument {rest[positional]!r}" if len(rest) > positional else "an argument is missing"
    raise InputError(f"{what}; see --help")
  return rest
