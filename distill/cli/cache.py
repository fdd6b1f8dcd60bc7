"""distill cache: what the teacher of a configuration says, kept on disk."""

import sys
from collections.abc import Sequence

from absl import flags

from distill.cli import recipe
from distill.jobs.cache import make
from distill.parallel.interruption import EXIT_INTERRUPTED

FLAGS = flags.FlagValues()
recipe.define(FLAGS, workdir="Directory of the cache.")


def main(arguments: Sequence[str]) -> int:
  """Runs the teacher once over all rows; the same command goes on. --config.path.to.key=value overrides a key."""
  config, workdir = recipe.read(FLAGS, arguments)
  code = make(config, workdir=workdir)
  if code == EXIT_INTERRUPTED:
    print("distill cache: stopped; the same command goes on", file=sys.stderr)
  else:
    print(f"wrote {workdir}; train with --config.teacher.cache={workdir}")
  return code
