"""distill train: runs what a configuration describes, or goes on with it."""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from distill.cli import compilation, configuration
from distill.cli.parsing import parse
from distill.evaluation.skills import read_skill
from distill.training.interrupt import EXIT_INTERRUPTED
from distill.training.metrics import summary
from distill.training.run import train

FLAGS = flags.FlagValues()
_CONFIG = flags.DEFINE_string(
  "config", None, "FILE.py or FILE.py:variant; --config.path.to.key=value overrides.", required=True, flag_values=FLAGS
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True, flag_values=FLAGS)
compilation.define(FLAGS)


def main(arguments: Sequence[str]) -> int:
  """Trains; the same command resumes. --config.path.to.key=value overrides a key."""
  rest, overrides = configuration.split(arguments)
  parse(FLAGS, rest)
  compilation.start(FLAGS)
  resolved = configuration.load(_CONFIG.value, overrides=overrides)
  for path in resolved["evaluation"]["skills"]:
    read_skill(pathlib.Path(path))  # Wrong ones would be found only when the run is over.
  workdir = pathlib.Path(_WORKDIR.value)
  code = train(resolved, workdir=workdir)
  if code == EXIT_INTERRUPTED:
    print("distill train: saved and stopped; the same command goes on", file=sys.stderr)
  else:
    print(summary(workdir))
    print(f"wrote {workdir / ('adapter' if resolved['student']['adapters']['targets'] else 'student')}")
  return code
