"""AdamW with ordered regex lists for learning rates and decay."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
import optax

from distill.schedules import schedule
from distill.training.config import OptimizerConfig
from distill.tree import Params, first_match


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
  config: OptimizerConfig, *, trained: Params, names: Mapping[str, Sequence[str]], key: str, steps: int
) -> optax.GradientTransformation:
  """Returns AdamW (Loshchilov & Hutter 2019, 1711.05101) over a flat dictionary of parameters.

  Args:
    config: Options of the optimizer.
    trained: Stage factor of every parameter that trains, from `multipliers`; 0 for single frozen layers.
    names: Stacked name -> canonical names.
    key: Where the options stand in the configuration, for messages.
    steps: Length of the stage.

  Raises:
    InputError: A rule list does not cover a parameter, or the learning rate is out of range.
  """
  rates = multipliers(config.learning_rates, names=names, what=f"{key}.learning_rates")
  decays = multipliers(config.decays, names=names, what=f"{key}.decays")

  def add_decay(updates, params):
    return {
      name: update + config.weight_decay * _broadcast(decays[name], update) * params[name]
      for name, update in updates.items()
    }

  def scale_rates(updates, params):
    del params
    return {
      name: update * _broadcast(rates[name], update) * _broadcast(trained[name], update)
      for name, update in updates.items()
    }

  rate = schedule(config.learning_rate, key=f"{key}.learning_rate", steps=steps, least=0)
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
    optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
    optax.stateless(add_decay),
    optax.scale_by_learning_rate(rate),
    optax.stateless(scale_rates),
  )
