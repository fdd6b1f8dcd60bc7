"""Builds a made-up report for tests."""

from distill.evaluation.report import FidelityRow, ModelRow, Report, SkillRow
from distill.evaluation.retention import Interval


def interval(value):
  return Interval(value=value, low=value - 0.05, high=value + 0.05)


def report(*models, retained=0.8, heldout=True, skill="book", stage="align"):
  """Returns a report on one skill for models given as (role, name).

  All models except base and teacher have the retention `retained`, if both of these are among the models.
  """
  rows = [{"role": role, "name": name} for role, name in models]
  both = {"base", "teacher"} <= {role for role, _ in models}
  measured = [row["role"] not in ("base", "teacher") for row in rows]
  return Report(
    date="2026-01-02",
    models=tuple(ModelRow(**row, family="llama", parameters=1000, width=8, layers=("attention",)) for row in rows),
    skills=tuple(
      SkillRow(
        **row,
        skill=skill,
        examples=10,
        chance=0.25,
        accuracy=interval(0.5),
        retention=interval(retained) if both and this and retained is not None else None,
      )
      for row, this in zip(rows, measured, strict=True)
    ),
    fidelity=tuple(
      FidelityRow(
        **row, tokens=99.0, bits_per_byte=1.5, kl=0.25 if this else None, top1_agreement=0.75 if this else None
      )
      for row, this in zip(rows, measured, strict=True)
      if heldout
    ),
    curves=({"step": 1, "stage": stage, "loss": 2.0}, {"step": 2, "stage": stage, "loss": 1.0}),
  )


THREE = (("base", "old"), ("teacher", "old + chat"), ("student", "new"))
