"""distill train: runs what a configuration describes, or goes on with it."""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from distill.cli import configuration
from distill.cli.parsing import parse
from distill.training.interrupt import EXIT_INTERRUPTED
from distill.training.run import train

FLAGS = flags.FlagValues()
_CONFIG = flags.DEFINE_string(
  "config", None, "FILE.py or FILE.py:variant; --config.path.to.key=value overrides.", required=True, flag_values=FLAGS
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True, flag_values=FLAGS)


def main(arguments: Sequence[str]) -> int:
  """Trains; the same command resumes. --config.path.to.key=value overrides a key."""
  rest, overrides = configuration.split(arguments)
  parse(FLAGS, rest)
  resolved = configuration.load(_CONFIG.value, overrides=overrides)
  code = train(resolved, workdir=pathlib.Path(_WORKDIR.value))
  if code == EXIT_INTERRUPTED:
    print("distill train: saved and stopped; the same command goes on", file=sys.stderr)
  return code
