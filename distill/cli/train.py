"""distill train: runs the training that a recipe describes, or continues it."""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from distill.cli import recipe
from distill.evaluation.skills import read_skill
from distill.jobs.run_directory import RunDirectory
from distill.jobs.train import train
from distill.parallel.interruption import EXIT_INTERRUPTED

FLAGS = flags.FlagValues()
recipe.define(FLAGS, workdir="Directory of the run.")


def main(arguments: Sequence[str]) -> int:
  """Runs the training of a recipe, or resumes it; returns the exit code.

  An argument --config.path.to.key=value overrides a key of the recipe.
  """
  config, workdir = recipe.read(FLAGS, arguments)
  for path in config.evaluation.skills:
    read_skill(pathlib.Path(path))  # Otherwise a wrong file would be found only after the training.
  directory = RunDirectory(workdir)
  code = train(config, workdir=workdir)
  if code == EXIT_INTERRUPTED:
    print("distill train: saved and stopped; the same command resumes", file=sys.stderr)
  else:
    print(directory.summary())
    print(f"wrote {directory.adapter if config.student.adapters.targets else directory.student}")
  return code
