"""Computes accuracy and retention (the share of the adapters' gain that a student keeps), with bootstrap intervals."""

import dataclasses

import numpy as np

_RESAMPLES = 2000
_SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
  """A measured value with its 95 % bootstrap interval, from `low` to `high`, over examples."""

  value: float
  low: float
  high: float


def accuracy(correct: np.ndarray) -> Interval:
  """Returns the share of True in `correct`, bool [examples], with its bootstrap interval."""
  samples = correct[_resample(len(correct))].mean(axis=1)
  return Interval(value=float(correct.mean()), low=_quantile(samples, 2.5), high=_quantile(samples, 97.5))


def retention(*, base: np.ndarray, teacher: np.ndarray, student: np.ndarray, chance: float) -> Interval | None:
  """Returns (student − base) / (teacher − base), where an accuracy below chance counts as chance.

  The three names stand for the models' accuracies, so the value is the share of the adapters' gain that the student
  retains; guessing retains nothing. The interval resamples examples, the same ones for all three models.

  Args:
    base: True where the base answers correctly, bool [examples].
    teacher: True where the base with all its adapters answers correctly, bool [examples].
    student: True where the student answers correctly, bool [examples].
    chance: Expected accuracy of guessing.

  Returns:
    The retention, or None if the teacher is no better than the base.
  """
  value = _ratio(base.mean(), teacher.mean(), student.mean(), chance)
  if not np.isfinite(value):
    return None
  rows = _resample(len(base))
  samples = _ratio(base[rows].mean(axis=1), teacher[rows].mean(axis=1), student[rows].mean(axis=1), chance)
  samples = samples[np.isfinite(samples)]
  return Interval(value=float(value), low=_quantile(samples, 2.5), high=_quantile(samples, 97.5))


def _ratio(base, teacher, student, chance):
  base, teacher, student = (np.maximum(x, chance) for x in (base, teacher, student))
  gain = np.asarray(teacher - base, np.float64)
  return np.where(gain > 0, (student - base) / np.where(gain > 0, gain, 1.0), np.nan)


def _resample(count: int) -> np.ndarray:
  return np.random.default_rng(_SEED).integers(0, count, (_RESAMPLES, count))


def _quantile(samples: np.ndarray, percent: float) -> float:
  return float(np.percentile(samples, percent))
