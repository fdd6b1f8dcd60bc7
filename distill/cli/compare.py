"""distill compare: measures a student against its teacher, skill by skill."""

import pathlib
from collections.abc import Sequence

from absl import flags

from distill.cli import configuration, models
from distill.cli.parsing import parse
from distill.evaluation.table import table
from distill.jobs.compare import compare

FLAGS = flags.FlagValues()
models.define(FLAGS, model="teacher", help="Directory of the teacher's base, or its name on the hub.")
_STUDENT = flags.DEFINE_string("student", None, "Directory of the student.", required=True, flag_values=FLAGS)
_CONFIG = flags.DEFINE_string("config", None, "FILE.py with evaluation settings.", required=True, flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", None, "Directory of the report.", required=True, flag_values=FLAGS)


def main(arguments: Sequence[str]) -> int:
  """Compares the models, writes report.json and report.html, and prints the main figures; returns the exit code."""
  rest, overrides = configuration.split(arguments)
  parse(FLAGS, rest)
  report = compare(
    _STUDENT.value,
    teacher=FLAGS.teacher,
    adapters=models.adapters(FLAGS),
    evaluation=configuration.load(_CONFIG.value, overrides=overrides).evaluation,
    out=_OUT.value,
  )
  print(f"{table(report)}\nreport: {pathlib.Path(_OUT.value) / 'report.html'}")
  return 0
