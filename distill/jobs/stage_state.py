"""Creates a stage's training state, fresh or from a checkpoint, and converts it to checkpoint arrays."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill.adapters import lora
from distill.errors import InputError
from distill.jobs.prepare import Run
from distill.jobs.stages import Stage
from distill.objectives.objective import initial_states
from distill.objectives.term import TermState
from distill.parallel.mesh import replicated
from distill.training.checkpoint import flatten_state, unflatten_state
from distill.training.optimizer import RateFactors, make_optimizer, multipliers, state_shardings
from distill.training.step import TERM_PARAMS, TrainState, branch, canonical_names
from distill.tree import Params


def begin(
  run: Run, stage: Stage, params: Params, *, done: int = 0, saved_states: Params | None = None
) -> tuple[TrainState, optax.GradientTransformation]:
  """Returns the training state of a stage at its start or after `done` steps, and the stage's optimizer.

  Args:
    run: The run.
    stage: One of its stages.
    params: All current parameters, trained and frozen.
    done: Number of the stage's steps already done.
    saved_states: States of the optimizer and the terms, as `from_arrays` returns them; by default both start fresh.

  Raises:
    InputError: The stage trains nothing, or no rule of its optimizer matches a parameter.
  """
  factors, optimizer = _optimizer(run, stage, params)
  trained = {name: params[name] for name in factors}
  shapes = jax.eval_shape(lambda params: _fresh(stage, optimizer, params), trained)
  if saved_states:
    optimizer_state, terms = unflatten_state(shapes, saved_states)
  else:
    shardings = state_shardings(shapes, params=params, mesh=run.mesh)
    fresh = jax.jit(lambda params: _fresh(stage, optimizer, params), out_shardings=shardings)
    optimizer_state, terms = fresh(trained)
  state = TrainState(
    trained=trained,
    frozen={name: x for name, x in params.items() if name not in trained},
    optimizer=optimizer_state,
    step=jax.device_put(jnp.asarray(done, jnp.int32), replicated(run.mesh)),
    terms=terms,
  )
  return state, optimizer


def to_arrays(state: TrainState) -> Params:
  """Returns the arrays of a training state under their names in a checkpoint: `params.…` and `optimizer.…`."""
  states = flatten_state((state.optimizer, state.terms))
  params = {f"params.{name}": x for name, x in state.params.items()}
  return params | {f"optimizer.{name}": x for name, x in states.items()}


def from_arrays(arrays: Params) -> tuple[Params, Params]:
  """Splits a checkpoint's arrays: returns (parameters, states of optimizer and terms), each without its prefix.

  `begin` takes the states as `saved_states`.
  """
  return branch(arrays, "params"), branch(arrays, "optimizer")


def abstract_state(run: Run, stage: Stage, params: Params) -> tuple[TrainState, optax.GradientTransformation]:
  """Returns shapes, dtypes and shardings of a stage's training state, and the stage's optimizer.

  Args:
    run: The run.
    stage: One of its stages.
    params: Parameters before the first step, or their shapes.

  Raises:
    InputError: The stage trains nothing, or no rule of its optimizer matches a parameter.
  """
  shardings = _param_shardings(run, params)
  shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name]) for name, x in params.items()}
  trained, optimizer = _optimizer(run, stage, shapes)
  mine = {name: shapes[name] for name in trained}
  carried = jax.eval_shape(lambda mine: _fresh(stage, optimizer, mine), mine)
  places = state_shardings(carried, params=shapes, mesh=run.mesh)
  opt, terms = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), carried, places)
  step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(run.mesh))
  state = TrainState(
    trained=mine,
    frozen={name: x for name, x in shapes.items() if name not in trained},
    optimizer=opt,
    step=step,
    terms=terms,
  )
  return state, optimizer


def array_shapes(run: Run, params: Params, *, stage: str) -> Params:
  """Returns array name -> `jax.ShapeDtypeStruct` with sharding, for all arrays in a checkpoint of one stage.

  Args:
    run: The run.
    params: Parameters before the first step.
    stage: Name of the stage in which the checkpoint was saved.
  """
  saved = next(one for one in run.stages if one.name == stage)
  return to_arrays(abstract_state(run, saved, params)[0])


def _fresh(
  stage: Stage, optimizer: optax.GradientTransformation, trained: Params
) -> tuple[optax.OptState, dict[str, TermState]]:
  """Returns the initial states of the optimizer and the terms."""
  return optimizer.init(trained), initial_states(stage.terms)


def _param_shardings(run: Run, params: Params) -> Params:
  student = {f"student.{name}": x for name, x in run.models.student.shardings(run.mesh).items()}
  factors = lora.shardings(run.models.student, branch(params, "adapters"), mesh=run.mesh)
  adapters = {f"adapters.{name}": x for name, x in factors.items()}
  return {name: replicated(run.mesh) for name in params} | student | adapters


def _optimizer(run: Run, stage: Stage, params: Mapping[str, Any]) -> tuple[RateFactors, optax.GradientTransformation]:
  """Returns the learning-rate factor of every parameter that the stage trains, and the stage's optimizer."""
  key = f"config.stages.{stage.name}"
  names = canonical_names(run.models.student, params)
  all_factors = multipliers(stage.config.train, names=names, what=f"{key}.train")
  # Parameters of terms train only in the stages that have these terms.
  used = jax.eval_shape(lambda: stage.term_params(run.config.seed))
  factors = {
    name: factor
    for name, factor in all_factors.items()
    if np.any(factor) and (not name.startswith(f"{TERM_PARAMS}.") or name in used)
  }
  if not factors:
    raise InputError(
      f"{key}.train: no parameter trains; add a rule (regex, factor) that gives a parameter a factor above 0"
    )
  optimizer = make_optimizer(
    stage.config.optimizer,
    factors=factors,
    names={name: names[name] for name in factors},
    key=f"{key}.optimizer",
    steps=stage.steps,
  )
  return factors, optimizer
