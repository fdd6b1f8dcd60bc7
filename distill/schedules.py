"""Numbers that may change with the step: `float | Schedule`."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from distill.errors import InputError

Schedule = Callable[[Any], Float[Array, ""]]


def schedule(spec: float | dict[str, Any], *, key: str, steps: int) -> Schedule:
  """A schedule over the `steps` steps of a stage.

  Args:
    spec: A number (constant), or one of
      dict(kind='linear', start, end) from the first to the last step,
      dict(kind='cosine', peak, end=0, warmup=0): linear from 0 over `warmup` steps, then cosine down to `end`.
    key: Where the value stands in the configuration, for messages.
    steps: Length of the stage, in optimizer steps.

  Raises:
    InputError: Unknown kind or field.
  """
  if isinstance(spec, int | float):
    return lambda step: jnp.full((), spec, jnp.float32)
  fields = dict(spec)
  kind = fields.pop("kind", None)
  try:
    if kind == "linear":
      return optax.linear_schedule(fields.pop("start"), fields.pop("end"), max(steps - 1, 1), **fields)
    if kind == "cosine":
      warmup, end = fields.pop("warmup", 0), fields.pop("end", 0.0)
      peak = fields.pop("peak")
      return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else peak, peak, warmup, max(steps, warmup + 1), end_value=end, **fields
      )
  except (KeyError, TypeError) as error:
    raise InputError(f"{key}: {kind} schedule with wrong fields ({error}); see distill/schedules.py") from error
  raise InputError(f"{key}: unknown schedule kind {kind!r}; use a number, kind='linear' or kind='cosine'")
