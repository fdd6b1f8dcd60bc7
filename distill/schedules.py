"""Schedules: numbers in a recipe that may change with the training step."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from distill.configuration import option, read_kind
from distill.errors import InputError

Schedule = Callable[[Any], Float[Array, ""]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
  """A number that changes over the steps of a stage."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScheduleConfig(ScheduleConfig):
  """A number that changes linearly from `start` at the first step to `end` at the last."""

  kind: str = option("linear", help="The kind of schedule.", choices=("linear",))
  start: float = option(help="Value at the first step.")
  end: float = option(help="Value at the last step.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineScheduleConfig(ScheduleConfig):
  """A number that rises linearly from 0 to `peak` (warm-up), then falls along half a cosine to `end`."""

  kind: str = option("cosine", help="The kind of schedule.", choices=("cosine",))
  peak: float = option(help="Value after the warm-up.")
  end: float = option(0.0, help="Value that the last steps approach.")
  warmup: int = option(0, help="Steps of the warm-up; fewer than the stage has.", least=0)


SCHEDULES: Mapping[str, type[ScheduleConfig]] = {"linear": LinearScheduleConfig, "cosine": CosineScheduleConfig}


def schedule(
  spec: Any,
  *,
  key: str,
  steps: int,
  least: float = -math.inf,
  above: float = -math.inf,
) -> Schedule:
  """Returns a function from the step of a stage to the value of a constant or a schedule, a float32 scalar.

  Args:
    spec: A recipe's value: a number, which is constant, or a schedule, which is one of `SCHEDULES` or a dict that is
      read into one.
    key: Where the value stands in the configuration; error messages begin with it.
    steps: Length of the stage, in optimizer steps.
    least: Smallest value allowed at any step.
    above: All values must be greater than this.

  Raises:
    InputError: The kind is unknown, a field is wrong, a value is out of range, or the warm-up is as long as the stage.
  """
  if isinstance(spec, int | float) and not isinstance(spec, bool):
    _check_range((spec,), spec, key=key, least=least, above=above)
    return lambda step: jnp.full((), spec, jnp.float32)
  if not isinstance(spec, ScheduleConfig | Mapping):
    raise InputError(f"{key}: got {spec!r}; use a number, or a dict with a kind for a schedule")
  match config := read_kind(SCHEDULES, spec, key=key):
    case LinearScheduleConfig():
      _check_range((config.start, config.end), config, key=key, least=least, above=above)
      return optax.linear_schedule(config.start, config.end, max(steps - 1, 1))
    case CosineScheduleConfig():
      if config.warmup >= max(steps, 1):
        raise InputError(f"{key}.warmup: got {config.warmup} steps, but the stage has only {steps}; use fewer")
      first = 0.0 if config.warmup else config.peak
      _check_range((first, config.peak, config.end), config, key=key, least=least, above=above)
      return optax.warmup_cosine_decay_schedule(first, config.peak, config.warmup, steps, end_value=config.end)
  raise AssertionError(config)


def _shown(spec: Any) -> str:
  if not isinstance(spec, ScheduleConfig):
    return repr(spec)
  return ", ".join(f"{name} {value}" for name, value in vars(spec).items())


def _check_range(values: tuple[float, ...], spec: Any, *, key: str, least: float, above: float) -> None:
  """Checks that a number, or a schedule at every step, is finite, at least `least` and greater than `above`.

  Args:
    values: The number; or the values at which parts of the schedule start and end, between which it is monotonic.
    spec: The number or schedule, for the error message.
    key: Its key in the recipe; the error message begins with it.
    least: Smallest allowed value.
    above: All values must be greater than this.

  Raises:
    InputError: One of `values` is out of range.
  """
  if not all(math.isfinite(value) and value >= least and value > above for value in values):
    limit = f" above {above:g}" if above > -math.inf else f" of at least {least:g}" if least > -math.inf else ""
    raise InputError(f"{key}: got {_shown(spec)}; use numbers{limit} at every step")
