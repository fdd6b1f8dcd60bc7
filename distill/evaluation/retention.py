"""How much of what the adapters added is still there in the student."""

import dataclasses

import numpy as np

_RESAMPLES = 2000
_SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
  """A figure with its 95 % bootstrap interval over examples."""

  value: float
  low: float
  high: float


def accuracy(correct: np.ndarray) -> Interval:
  """Share of right answers [examples]."""
  samples = correct[_resample(len(correct))].mean(axis=1)
  return Interval(value=float(correct.mean()), low=_quantile(samples, 2.5), high=_quantile(samples, 97.5))


def retention(*, base: np.ndarray, stack: np.ndarray, student: np.ndarray, chance: float) -> Interval | None:
  """(student − base) / (stack − base), where accuracies below chance count as chance.

  Guessing is worth nothing: with c(x) = (max(x, chance) − chance) / (1 − chance) this is the share of the
  chance-corrected gain of the stack. The interval resamples examples, the same ones for all three models.

  Args:
    base: Whether each example was answered rightly by the bare base, bool [examples].
    stack: The same, by the base with all adapters.
    student: The same, by the student.
    chance: Expected accuracy of guessing.

  Returns:
    None when the stack is no better than the base: there is nothing to retain.
  """
  value = _ratio(base.mean(), stack.mean(), student.mean(), chance)
  if not np.isfinite(value):
    return None
  rows = _resample(len(base))
  samples = _ratio(base[rows].mean(axis=1), stack[rows].mean(axis=1), student[rows].mean(axis=1), chance)
  samples = samples[np.isfinite(samples)]
  return Interval(value=float(value), low=_quantile(samples, 2.5), high=_quantile(samples, 97.5))


def _ratio(base, stack, student, chance):
  base, stack, student = (np.maximum(x, chance) for x in (base, stack, student))
  gain = np.asarray(stack - base, np.float64)
  return np.where(gain > 0, (student - base) / np.where(gain > 0, gain, 1.0), np.nan)


def _resample(count: int) -> np.ndarray:
  return np.random.default_rng(_SEED).integers(0, count, (_RESAMPLES, count))


def _quantile(samples: np.ndarray, percent: float) -> float:
  return float(np.percentile(samples, percent))
