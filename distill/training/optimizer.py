"""Builds optax optimizers whose learning rates and weight decay are set by ordered lists of regex rules."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from distill.parallel.mesh import replicated
from distill.schedules import schedule
from distill.training.config import OptimizerConfig
from distill.tree import Params, first_match

# Stacked name -> the factor of a parameter: a number, or an array of one factor for each layer.
RateFactors = dict[str, float | np.ndarray]


def multipliers(rules: Sequence[tuple[str, float]], *, names: Mapping[str, Sequence[str]], what: str) -> RateFactors:
  """Returns stacked name -> factor from the rules: one number, or an array [layers] if it differs between layers.

  Args:
    rules: Ordered (regex, factor) pairs, matched against canonical names; the first match counts.
    names: Stacked name -> the canonical names of its layers, in order.
    what: Recipe key of the rules, for error messages.

  Raises:
    InputError: No rule matches a parameter.
  """
  factors: RateFactors = {}
  for stacked, canonical in names.items():
    values = [float(first_match(rules, name, what=what)) for name in canonical]
    factors[stacked] = values[0] if len(set(values)) == 1 else np.asarray(values, np.float32)
  return factors


def _broadcast(factor, like):
  return factor if np.ndim(factor) == 0 else jnp.asarray(factor).reshape(-1, *[1] * (like.ndim - 1))


def make_optimizer(
  config: OptimizerConfig, *, factors: RateFactors, names: Mapping[str, Sequence[str]], key: str, steps: int
) -> optax.GradientTransformation:
  """Returns the optimizer of a stage over a flat dictionary of parameters.

  Weight decay is decoupled from the update rule (Loshchilov & Hutter 2019, 1711.05101) for every update rule.

  Args:
    config: Options of the optimizer from the recipe.
    factors: Learning-rate factor of every trained parameter by the stage's `train` rules, as `multipliers` returns it;
      0 freezes a layer.
    names: Stacked name -> canonical names of its layers.
    key: Key of the options in the recipe, for error messages.
    steps: Length of the stage in optimizer steps.

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
      name: update * _broadcast(rates[name], update) * _broadcast(factors[name], update)
      for name, update in updates.items()
    }

  rate = schedule(config.learning_rate, key=f"{key}.learning_rate", steps=steps, least=0)
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
    _standard_promotion(_update_rule(config)),
    optax.stateless(add_decay),
    _standard_promotion(optax.scale_by_learning_rate(rate)),
    optax.stateless(scale_rates),
  )


def _standard_promotion(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """Wraps a transformation so that its updates run under standard dtype promotion, whatever mode JAX is set to."""

  def update(*arguments: Any) -> Any:
    # optax 0.2.8 mixes floats with an int32 counter in tree_bias_correction and in its schedules: a TypePromotionError
    # under strict promotion.
    with jax.numpy_dtype_promotion("standard"):
      return inner.update(*arguments)

  return optax.GradientTransformation(inner.init, update)


def _update_rule(config: OptimizerConfig) -> optax.GradientTransformation:
  """Returns the transformation of gradients to updates, before weight decay and the learning rate."""
  match config.name:
    case "adamw":
      return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    case "lion":
      return optax.scale_by_lion(b1=config.b1, b2=config.b2)
    case "sgd":
      return optax.trace(decay=config.b1) if config.b1 else optax.identity()
    case "adafactor":
      return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())
    case "muon":
      # optax's Muon multiplies by minus its learning rate: -1 leaves rate and sign to the rest of the chain. A
      # consistent RMS of 0.2 makes its updates as large as AdamW's, so that both parts may share a learning rate.
      return optax.contrib.muon(
        -1.0,
        adam_b1=config.b1,
        adam_b2=config.b2,
        eps=config.eps,
        muon_weight_dimension_numbers=_matrices,
        consistent_rms=0.2,
      )
  raise AssertionError(config.name)


def _matrices(params: Params) -> dict[str, optax.contrib.MuonDimensionNumbers | None]:
  """Returns, by name, the matrix axes of stacked kernels, which Muon updates; None for parameters left to AdamW."""
  axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
  kernels = {name for name in params if ".groups." in name and name.endswith(".kernel") and ".conv." not in name}
  return {name: axes if name in kernels else None for name in params}


def state_shardings(state: Any, *, params: Mapping[str, Any], mesh: Mesh) -> Any:
  """Returns a pytree of shardings for an optimizer's state.

  Moments are sharded like their parameter. Everything else is replicated: counters, and Adafactor's factored
  moments, which hold only one row and one column for each layer.

  Args:
    state: The state, or its shapes: a pytree whose paths end in the names of parameters.
    params: The parameters, or their shapes with shardings.
    mesh: The devices.
  """

  def leaf_sharding(path: Any, leaf: Any) -> Any:
    name = path[-1].key if path and isinstance(path[-1], jax.tree_util.DictKey) else ""
    same = name in params and params[name].shape == leaf.shape
    return params[name].sharding if same else replicated(mesh)

  return jax.tree_util.tree_map_with_path(leaf_sharding, state)
