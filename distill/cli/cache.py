"""distill cache: what the teacher of a configuration says, kept on disk."""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from distill.cli import compilation, configuration
from distill.cli.parsing import parse
from distill.training.cache import make
from distill.training.interrupt import EXIT_INTERRUPTED

FLAGS = flags.FlagValues()
_CONFIG = flags.DEFINE_string(
  "config", None, "FILE.py or FILE.py:variant; --config.path.to.key=value overrides.", required=True, flag_values=FLAGS
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the cache.", required=True, flag_values=FLAGS)
compilation.define(FLAGS)


def main(arguments: Sequence[str]) -> int:
  """Runs the teacher once over all rows; the same command goes on. --config.path.to.key=value overrides a key."""
  rest, overrides = configuration.split(arguments)
  parse(FLAGS, rest)
  compilation.start(FLAGS)
  workdir = pathlib.Path(_WORKDIR.value)
  code = make(configuration.load(_CONFIG.value, overrides=overrides), workdir=workdir)
  if code == EXIT_INTERRUPTED:
    print("distill cache: stopped; the same command goes on", file=sys.stderr)
  else:
    print(f"wrote {workdir}; train with --config.teacher.cache={workdir}")
  return code
