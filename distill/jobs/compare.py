"""The compare job: measures a student against its teacher and writes a report."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

from distill.adapters.stack import Stack
from distill.checkpoints.hub import locate
from distill.configuration import read
from distill.data.sources import open_source
from distill.data.store import build_store
from distill.data.tokenizer import load_tokenizer
from distill.errors import InputError
from distill.evaluation.compare import compare_models, write
from distill.evaluation.config import EvaluationConfig
from distill.evaluation.model import BASE, STUDENT, TEACHER, EvaluatedModel
from distill.evaluation.report import Report
from distill.evaluation.skills import read_skill
from distill.jobs.loading import Adapters, Path, adapter_stack, load_model
from distill.jobs.run_directory import RunDirectory

_LENGTH = 128  # Tokens of a row of held-out text.


def compare(
  student: Path,
  *,
  teacher: Path,
  evaluation: EvaluationConfig | Mapping[str, Any],
  out: Path,
  adapters: Adapters = (),
) -> Report:
  """Measures a student, its teacher and the teacher's base on skills and held-out text, and writes a report.

  Args:
    student: Model directory, or org/name[@revision] of the hub. If metrics.jsonl lies next to the directory, the report
      draws its training curves.
    teacher: Model directory or hub name of the teacher's base.
    evaluation: Skills and held-out text to measure on: the `evaluation` section of a recipe.
    out: Directory that gets report.json and report.html.
    adapters: The teacher's PEFT directories or hub names, merged in this order; or the JSON file of a stack.

  Returns:
    The report that was written.

  Raises:
    InputError: A model, an adapter, a skill or the text is wrong, or `out` cannot be written.
  """
  config = read(EvaluationConfig, evaluation, key="config.evaluation")
  skills = [read_skill(pathlib.Path(path)) for path in config.skills]
  if not skills and not config.heldout:
    raise InputError("config.evaluation: skills and heldout are both empty; set at least one of them")
  student_path, teacher_path, stack = locate(student), locate(teacher), adapter_stack(adapters)
  names = " + ".join([_name(teacher), *(entry.path.name for entry in stack)])
  base = EvaluatedModel(role=BASE, name=_name(teacher), **_load(teacher_path))
  models = [
    base,
    dataclasses.replace(base, role=TEACHER, name=names, **(_load(teacher_path, stack) if stack else {})),
    EvaluatedModel(role=STUDENT, name=_name(student), **_load(student_path)),
  ]
  teacher_vocab, student_vocab = (model.decoder.config.vocab_size for model in (base, models[-1]))
  if student_vocab != teacher_vocab:
    raise InputError(
      f"{student_path}/config.json: vocab_size is {student_vocab}, but the teacher's is {teacher_vocab}; compare "
      "models that share a tokenizer"
    )
  tokenizer = load_tokenizer(teacher_path)
  with tempfile.TemporaryDirectory() as scratch:
    heldout = None
    if config.heldout:
      source = open_source(config.heldout, key="config.evaluation.heldout")
      heldout = build_store(source, tokenizer=tokenizer, length=_LENGTH, directory=scratch)
    report = compare_models(
      models,
      tokenizer=tokenizer,
      skills=skills,
      heldout=heldout,
      curves=RunDirectory(student_path.parent).metrics(),
    )
  write(report, out=pathlib.Path(out))
  return report


def _name(model: Path) -> str:
  return pathlib.PurePath(str(model).partition("@")[0]).name


def _load(model: pathlib.Path, stack: Stack = ()) -> dict[str, Any]:
  decoder, params = load_model(model, stack=stack)
  return {"decoder": decoder, "params": params}
