"""Student against teacher, skill by skill, as one report."""

import dataclasses
import datetime
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from distill.data.store import TokenStore
from distill.errors import InputError
from distill.evaluation.fidelity import fidelity
from distill.evaluation.html import render
from distill.evaluation.model import Model
from distill.evaluation.retention import accuracy, retention
from distill.evaluation.skills import Skill, correct
from distill.files.replace import replace_file

SCHEMA = 1


def compare(
  *,
  student: Model,
  teacher: Model,
  base: Model,
  tokenizer: PreTrainedTokenizerBase,
  skills: Sequence[Skill],
  heldout: TokenStore | None,
  curves: Sequence[dict[str, float]] = (),
) -> dict[str, Any]:
  """The report: per skill base, stack and student with intervals and retention; fidelity on held-out text; curves.

  Args:
    student: The student.
    teacher: The base with its adapters merged.
    base: The bare base.
    tokenizer: Shared by all three.
    skills: Tests to run.
    heldout: Text that nobody was trained on, if any.
    curves: Lines of the student's metrics.jsonl, if it has one.
  """
  models = {"base": base, "stack": teacher, "student": student}
  rows = []
  for skill in skills:
    right = {name: correct(model, skill=skill, tokenizer=tokenizer) for name, model in models.items()}
    kept = retention(**right, chance=skill.chance)
    rows.append(
      {
        "name": skill.name,
        "examples": len(skill.examples),
        "chance": skill.chance,
        **{name: dataclasses.asdict(accuracy(values)) for name, values in right.items()},
        "retention": None if kept is None else dataclasses.asdict(kept),
      }
    )
  return {
    "schema": SCHEMA,
    "date": datetime.date.today().isoformat(),
    "models": {name: describe(model) for name, model in (("teacher", teacher), ("student", student))},
    "skills": rows,
    "fidelity": None if heldout is None else fidelity(student=student, teacher=teacher, base=base, store=heldout),
    "curves": [{key: line[key] for key in line if key in ("step", "stage", "loss")} for line in curves],
  }


def describe(model: Model) -> dict[str, Any]:
  """Name, family, number of parameters, and the kind of every layer's mixer."""
  config = model.decoder.config
  return {
    "name": model.name,
    "family": config.family,
    "parameters": model.size,
    "width": config.width,
    "layers": [layer.mixer.kind for layer in config.layers],
  }


def table(report: dict[str, Any]) -> str:
  """The report's main figures as aligned text."""
  lines = [f"{'skill':<12}{'chance':>8}{'base':>8}{'stack':>8}{'student':>9}   retention of the stack's gain (95 %)"]
  for row in report["skills"]:
    kept = row["retention"]
    text = "the stack gains nothing"
    if kept is not None:
      text = f"{kept['value']:6.1%}  ({kept['low']:.0%} to {kept['high']:.0%})"
    figures = "".join(
      f"{row[name]['value']:>{width}.1%}" for name, width in (("base", 8), ("stack", 8), ("student", 9))
    )
    lines.append(f"{row['name']:<12}{row['chance']:>8.1%}{figures}   {text}")
  if report["fidelity"]:
    far = report["fidelity"]
    lines.append(
      f"held-out text: KL {far['kl']:.3f} nats a token, top-1 agreement {far['top1_agreement']:.1%}, bits per byte "
      f"base {far['bits_per_byte_base']:.3f}, stack {far['bits_per_byte_teacher']:.3f}, "
      f"student {far['bits_per_byte_student']:.3f}"
    )
  sizes = {name: report["models"][name]["parameters"] for name in ("teacher", "student")}
  lines.append(
    f"parameters: teacher {sizes['teacher']:,}, student {sizes['student']:,} "
    f"({sizes['student'] / sizes['teacher']:.1%})"
  )
  return "\n".join(lines)


def write(report: dict[str, Any], *, out: pathlib.Path) -> None:
  """`report.json` and `report.html` under `out`.

  Raises:
    InputError: The directory cannot be written.
  """
  try:
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("report.json", json.dumps(report, indent=1) + "\n"), ("report.html", render(report))):
      with replace_file(out / name) as work:
        work.write_text(text, encoding="utf-8")
  except OSError as error:
    raise InputError(f"{out}: cannot be written ({error.strerror}); name another --out") from error
