"""distill compare: a student against its teacher, skill by skill."""

import json
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

from absl import flags

from distill.checkpoints.hub import locate
from distill.cli import configuration, models
from distill.cli.parsing import parse
from distill.data.sources import open_source
from distill.data.store import build
from distill.data.tokenizer import load_tokenizer
from distill.errors import InputError
from distill.evaluation.compare import compare, table, write
from distill.evaluation.model import Model
from distill.evaluation.skills import read_skill

FLAGS = flags.FlagValues()
models.define(FLAGS, model="teacher", what="Directory of the teacher's base.")
_STUDENT = flags.DEFINE_string("student", None, "Directory of the student.", required=True, flag_values=FLAGS)
_CONFIG = flags.DEFINE_string("config", None, "FILE.py with evaluation settings.", required=True, flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", None, "Directory of the report.", required=True, flag_values=FLAGS)


def main(arguments: Sequence[str]) -> int:
  """Writes report.json and report.html, and prints the table."""
  rest, overrides = configuration.split(arguments)
  parse(FLAGS, rest)
  settings = configuration.load(_CONFIG.value, overrides=overrides).evaluation
  skills = [read_skill(pathlib.Path(path)) for path in settings.skills]
  if not skills and not settings.heldout:
    raise InputError(f"{_CONFIG.value}: config.evaluation names neither skills nor heldout text; nothing to compare")
  student_path, teacher_path = locate(_STUDENT.value), locate(FLAGS.teacher)
  stack = models.stack(FLAGS)
  names = " + ".join([_name(FLAGS.teacher), *(entry.path.name for entry in stack)])
  student = _model(_name(_STUDENT.value), *models.load(str(student_path)))
  base = _model(_name(FLAGS.teacher), *models.load(str(teacher_path)))
  teacher = _model(names, *models.load(str(teacher_path), stack=stack)) if stack else base
  vocab = base.decoder.config.vocab_size
  if student.decoder.config.vocab_size != vocab:
    raise InputError(
      f"{student_path}/config.json: vocab_size {student.decoder.config.vocab_size}, the teacher's is "
      f"{vocab}; student and teacher must share a tokenizer"
    )
  tokenizer = load_tokenizer(str(teacher_path))
  with tempfile.TemporaryDirectory() as scratch:
    heldout = None
    if settings.heldout:
      source = open_source(settings.heldout, key="config.evaluation.heldout")
      heldout = build(source, tokenizer=tokenizer, length=128, directory=scratch)
    report = compare(
      student=student,
      teacher=teacher,
      base=base,
      tokenizer=tokenizer,
      skills=skills,
      heldout=heldout,
      curves=_curves(student_path.parent / "metrics.jsonl"),
    )
  out = pathlib.Path(_OUT.value)
  write(report, out=out)
  print(f"{table(report)}\nreport: {out / 'report.html'}")
  return 0


def _name(model: str) -> str:
  return pathlib.PurePath(model.partition("@")[0]).name


def _model(name: str, decoder, params) -> Model:
  return Model(name=name, decoder=decoder, params=params)


def _curves(path: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of a run's metrics beside the student, if it stands in a run's directory."""
  if not path.is_file():
    return []
  return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
