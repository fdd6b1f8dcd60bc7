"""distill inspect: describes a model, adapter, run, checkpoint, token store or teacher cache."""

from collections.abc import Sequence

from absl import flags

from distill.cli.parsing import parse
from distill.jobs.inspect import inspect

FLAGS = flags.FlagValues()
_MODEL = flags.DEFINE_string(
  "model",
  "",
  "Directory or hub name of the base against which an adapter is measured.",
  flag_values=FLAGS,
)


def main(arguments: Sequence[str]) -> int:
  """Prints a description of the directory that the command line names, line by line; returns the exit code."""
  (directory,) = parse(FLAGS, arguments, positional=["DIR"])
  for line in inspect(directory, model=_MODEL.value):
    print(line)
  return 0
