"""AdamW with ordered regex lists for learning rates and decay."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from distill.errors import InputError
from distill.schedules import schedule
from distill.tree import Params, first_match

_FIELDS = {"learning_rate", "b1", "b2", "eps", "weight_decay", "clip_norm", "learning_rates", "decays"}


def multipliers(rules: Sequence[tuple[str, float]], *, names: Mapping[str, Sequence[str]], what: str) -> Params:
  """The factor of each stacked parameter: an array over its layers where they differ, else a number.

  Args:
    rules: Ordered (regex, factor) pairs, matched against canonical names; the first match counts.
    names: Stacked name -> the canonical names of its layers, in order.
    what: Where the rules stand, for messages.

  Raises:
    InputError: A parameter that no rule covers.
  """
  factors: Params = {}
  for stacked, canonical in names.items():
    values = [float(first_match(rules, name, what=what)) for name in canonical]
    factors[stacked] = values[0] if len(set(values)) == 1 else np.asarray(values, np.float32)
  return factors


def _broadcast(factor, like):
  return factor if np.ndim(factor) == 0 else jnp.asarray(factor).reshape(-1, *[1] * (like.ndim - 1))


def make_optimizer(
  spec: Mapping[str, Any], *, trained: Params, names: Mapping[str, Sequence[str]], key: str, steps: int
) -> optax.GradientTransformation:
  """AdamW (Loshchilov & Hutter 2019, 1711.05101) over a flat dictionary of parameters.

  Args:
    spec: learning_rate (number or schedule), b1 0.9, b2 0.95, eps 1e-8, weight_decay 0, clip_norm 1.0 (global norm;
      0 for none), learning_rates and decays: ordered (regex, factor) pairs on canonical names, default all 1.
    trained: Stage factor of every parameter that trains, from `multipliers`; 0 for single frozen layers.
    names: Stacked name -> canonical names.
    key: Where the specification stands, for messages.
    steps: Length of the stage.

  Raises:
    InputError: Unknown field, or a parameter that a rule list does not cover.
  """
  spec = dict(spec)
  if unknown := set(spec) - _FIELDS:
    raise InputError(f"{key}.{min(unknown)}: not a field of the optimizer; it has {', '.join(sorted(_FIELDS))}")
  everything = ((".*", 1.0),)
  rates = multipliers(spec.get("learning_rates", everything), names=names, what=f"{key}.learning_rates")
  decays = multipliers(spec.get("decays", everything), names=names, what=f"{key}.decays")
  decay = spec.get("weight_decay", 0.0)

  def add_decay(updates, params):
    return {name: update + decay * _broadcast(decays[name], update) * params[name] for name, update in updates.items()}

  def scale_rates(updates, params):
    del params
    return {
      name: update * _broadcast(rates[name], update) * _broadcast(trained[name], update)
      for name, update in updates.items()
    }

  rate = schedule(spec.get("learning_rate", 1e-3), key=f"{key}.learning_rate", steps=steps)
  clip = spec.get("clip_norm", 1.0)
  return optax.chain(
    optax.clip_by_global_norm(clip) if clip else optax.identity(),
    optax.scale_by_adam(b1=spec.get("b1", 0.9), b2=spec.get("b2", 0.95), eps=spec.get("eps", 1e-8)),
    optax.stateless(add_decay),
    optax.scale_by_learning_rate(rate),
    optax.stateless(scale_rates),
  )
