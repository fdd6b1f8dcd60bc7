"""Compares several models on multiple-choice skills and held-out text, and writes the report."""

import datetime
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from distill.data.store import TokenStore
from distill.errors import InputError
from distill.evaluation.fidelity import fidelity
from distill.evaluation.html import render
from distill.evaluation.model import BASE, TEACHER, EvaluatedModel
from distill.evaluation.report import ModelRow, Report, SkillRow
from distill.evaluation.retention import accuracy, retention
from distill.evaluation.skills import Skill, correct_answers
from distill.files.replace import replace_file


def compare_models(
  models: Sequence[EvaluatedModel],
  *,
  tokenizer: PreTrainedTokenizerBase,
  skills: Sequence[Skill] = (),
  heldout: TokenStore | None = None,
  curves: Sequence[Mapping[str, Any]] = (),
) -> Report:
  """Measures models on skills and held-out text, and returns the report.

  Retention is measured only with a base and a teacher among the models, KL only with a teacher.

  Args:
    models: Models that share a tokenizer, in the order of the report's columns.
    tokenizer: Their tokenizer.
    skills: Multiple-choice tests to run.
    heldout: Tokenised text that no model was trained on; None to measure skills alone.
    curves: Lines of the student's metrics.jsonl, for the report's loss curves; empty if unknown.
  """
  return Report(
    date=datetime.date.today().isoformat(),
    models=tuple(map(_model_row, models)),
    skills=tuple(row for skill in skills for row in _skill_rows(models, skill=skill, tokenizer=tokenizer)),
    fidelity=() if heldout is None else fidelity(models, store=heldout),
    curves=tuple({key: line[key] for key in line if key in ("step", "stage", "loss")} for line in curves),
  )


def _model_row(model: EvaluatedModel) -> ModelRow:
  config = model.decoder.config
  return ModelRow(
    role=model.role,
    name=model.name,
    family=config.family,
    parameters=model.size,
    width=config.width,
    layers=tuple(layer.mixer.kind for layer in config.layers),
  )


def _skill_rows(
  models: Sequence[EvaluatedModel], *, skill: Skill, tokenizer: PreTrainedTokenizerBase
) -> list[SkillRow]:
  answers = [correct_answers(model, skill=skill, tokenizer=tokenizer) for model in models]
  by_role = {model.role: correct for model, correct in zip(models, answers, strict=True)}
  rows = []
  for model, correct in zip(models, answers, strict=True):
    retained = None
    if model.role not in (BASE, TEACHER) and {BASE, TEACHER} <= set(by_role):
      retained = retention(base=by_role[BASE], teacher=by_role[TEACHER], student=correct, chance=skill.chance)
    rows.append(
      SkillRow(
        skill=skill.name,
        examples=len(skill.examples),
        chance=skill.chance,
        role=model.role,
        name=model.name,
        accuracy=accuracy(correct),
        retention=retained,
      )
    )
  return rows


def write(report: Report, *, out: pathlib.Path) -> None:
  """Writes `report.json` and `report.html` into the directory `out`, which is created if missing.

  Raises:
    InputError: The directory cannot be written.
  """
  texts = {"report.json": json.dumps(report.to_json(), indent=1) + "\n", "report.html": render(report)}
  try:
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
      with replace_file(out / name) as work:
        work.write_text(text, encoding="utf-8")
  except OSError as error:
    raise InputError(f"{out}: the report cannot be written here ({error.strerror}); name another directory") from error
