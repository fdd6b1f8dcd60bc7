"""distill train: runs what a configuration describes, or goes on with it."""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from distill.cli import recipe
from distill.evaluation.skills import read_skill
from distill.jobs.train import train
from distill.parallel.interruption import EXIT_INTERRUPTED
from distill.training.metrics import summary

FLAGS = flags.FlagValues()
recipe.define(FLAGS, workdir="Directory of the run.")


def main(arguments: Sequence[str]) -> int:
  """Trains; the same command resumes. --config.path.to.key=value overrides a key."""
  config, workdir = recipe.read(FLAGS, arguments)
  for path in config.evaluation.skills:
    read_skill(pathlib.Path(path))  # Wrong ones would be found only when the run is over.
  code = train(config, workdir=workdir)
  if code == EXIT_INTERRUPTED:
    print("distill train: saved and stopped; the same command goes on", file=sys.stderr)
  else:
    print(summary(workdir))
    print(f"wrote {workdir / ('adapter' if config.student.adapters.targets else 'student')}")
  return code
