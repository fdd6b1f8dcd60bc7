"""distill cache: stores the teacher's outputs for a recipe's rows on disk."""

import sys
from collections.abc import Sequence

from absl import flags

from distill.cli import recipe
from distill.jobs.cache import cache_teacher
from distill.parallel.interruption import EXIT_INTERRUPTED

FLAGS = flags.FlagValues()
recipe.define(FLAGS, workdir="Directory of the teacher cache.")


def main(arguments: Sequence[str]) -> int:
  """Writes the teacher cache of a recipe, or resumes it; returns the exit code.

  An argument --config.path.to.key=value overrides a key of the recipe.
  """
  config, workdir = recipe.read(FLAGS, arguments)
  code = cache_teacher(config, workdir=workdir)
  if code == EXIT_INTERRUPTED:
    print("distill cache: stopped; the same command resumes", file=sys.stderr)
  else:
    print(f"wrote {workdir}; train with --config.teacher.cache={workdir}")
  return code
