"""The command line: runs the named command; wrong input ends with a one-line message and exit code 2."""

import difflib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from absl import flags

from distill.cli.parsing import help_text
from distill.errors import InputError

COMMANDS = {
  "cache": "store the signal of a recipe's teacher on disk, to train without the teacher",
  "train": "run a recipe: distil a teacher into a student, train an adapter, or pretrain",
  "init": "write a student that is copied, cut or converted from its teacher",
  "plan": "compile a recipe's step for TPU pods: memory, time and cost, before they are paid for",
  "score": "write the logits and hidden states of a model for given tokens",
  "generate": "continue a prompt",
  "compare": "measure a student against its teacher, skill by skill, and write a report",
  "export": "write a model as a Hugging Face directory",
  "merge": "merge adapters into a model, or several adapters into one",
  "inspect": "describe a directory: model, adapter, run, checkpoint, token store or teacher cache",
}
_LONGEST = 2000
EXIT_INPUT, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 2, 130, 141


def run() -> None:
  """Runs the command line of this process, and exits with the command's code; entry point of the `distill` script."""
  sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
  """Runs the command that `arguments` name, and returns its exit code."""
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
      hint = f"did you mean {near[0]}?" if near else "run `distill` without arguments to list the commands"
      raise InputError(f"{name!r}: unknown command; {hint}")
    command = _load(name)
    if "--help" in rest or "-h" in rest:
      print(f"distill {name}: {COMMANDS[name]}\n{help_text(command.FLAGS)}")
      return 0
    return command.main(rest)
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Nothing is left to flush at exit.
    return EXIT_BROKEN_PIPE
  except (InputError, flags.Error, OSError) as error:
    if debug:
      raise
    line = " ".join(str(error).split())
    # A name in somebody else's file may hold control characters that a terminal would obey.
    shown = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in line)
    print(f"distill {name}: {shown[:_LONGEST]}", file=sys.stderr)
    return EXIT_INPUT
  except KeyboardInterrupt:
    print(f"distill {name}: interrupted", file=sys.stderr)
    return EXIT_INTERRUPTED


def _load(name: str) -> ModuleType:
  """Imports a command's module when it is run, so that listing the commands does not wait for jax."""
  match name:
    case "cache":
      from distill.cli import cache

      return cache
    case "train":
      from distill.cli import train

      return train
    case "init":
      from distill.cli import init

      return init
    case "plan":
      from distill.cli import plan

      return plan
    case "score":
      from distill.cli import score

      return score
    case "generate":
      from distill.cli import generate

      return generate
    case "compare":
      from distill.cli import compare

      return compare
    case "export":
      from distill.cli import export

      return export
    case "merge":
      from distill.cli import merge

      return merge
    case "inspect":
      from distill.cli import inspect

      return inspect
  raise AssertionError(name)
