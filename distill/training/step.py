"""The training step: a pure function, jitted with explicit shardings, which donates the state that it is given."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from distill.adapters import lora
from distill.axes.logical import constrain, use_mesh
from distill.models.decoder import Decoder
from distill.objectives.objective import (
  counts,
  loss_sums,
  needs_student,
  needs_teacher,
  next_states,
  student_capture,
  teacher_capture,
)
from distill.objectives.term import LossContext, LossInputs, Term, TermState
from distill.parallel.mesh import batch_sharding, batch_shards, replicated
from distill.teachers.teacher import Teacher
from distill.tree import Params
from distill.types import Batch

Metrics = dict[str, Float[Array, ""]]
# Parameters of terms are named under this, in training states and checkpoints.
TERM_PARAMS = "projectors"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
  """The state of training: parameters, optimizer state, step count and term states.

  Attributes:
    trained: Parameters that the stage trains, stacked: `student.…`, `adapters.…` and the terms' `projectors.…`.
    frozen: All other parameters.
    optimizer: State of the optimizer that updates `trained`.
    step: Number of steps done in the stage.
    terms: State of each term that has one, by the term's index in the stage.
  """

  trained: Params
  frozen: Params
  optimizer: Any
  step: Int[Array, ""]
  terms: Mapping[str, TermState]

  @property
  def params(self) -> Params:
    """Returns all parameters by name, trained and frozen."""
    return {**self.frozen, **self.trained}


def branch(params: Mapping[str, Any], name: str) -> Params:
  """Returns the parameters whose names start with `name` and a dot, by their names without that prefix."""
  return {key[len(name) + 1 :]: value for key, value in params.items() if key.startswith(f"{name}.")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
  """Values that are fixed when a training step is compiled.

  Attributes:
    terms: Terms of the stage.
    steps: Length of the stage in optimizer steps.
    micro_batches: Number of parts of a batch whose gradients are accumulated before the update.
    dtype: Dtype of the operands; sums and parameters are float32.
    adapter_scale: alpha / rank of the adapters that train, if any do.
    remat: Name of the student's remat policy, a key of `REMAT_POLICIES`.
  """

  terms: tuple[Term, ...]
  steps: int
  micro_batches: int = 1
  dtype: Any = jnp.bfloat16
  adapter_scale: float = 1.0
  remat: str = "projections"


def make_step(
  student: Decoder,
  *,
  teacher: Teacher | None,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  state_shardings: TrainState,
  config: StepConfig,
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]:
  """Returns the jitted training step of a stage.

  Args:
    student: The student's architecture.
    teacher: The teacher, if any term needs one.
    optimizer: Update rule for the trained parameters.
    mesh: Devices that the batch and the parameters are spread over.
    state_shardings: Shardings of the state, of the same structure.
    config: Values that are fixed when the step is compiled.

  Returns:
    step(state, teacher's parameters, global batch) -> (state, metrics), jitted; it donates the state it is given.
  """
  shards = batch_shards(mesh)

  def step(state: TrainState, teacher_params: Params, batch: Batch) -> tuple[TrainState, Metrics]:
    with use_mesh(mesh):
      return update(state, teacher_params, batch)

  def update(state: TrainState, teacher_params: Params, batch: Batch) -> tuple[TrainState, Metrics]:
    context = LossContext(step=state.step, steps=config.steps, totals=counts(batch), states=state.terms, shards=shards)

    def loss(trained: Params, micro: Batch):
      params = {**state.frozen, **trained}
      inputs = _inputs(student, params, teacher, teacher_params, micro, config)
      return loss_sums(config.terms, inputs, context=context)

    gradient = jax.value_and_grad(loss, has_aux=True)
    (value, parts), grads = _accumulated(lambda micro: gradient(state.trained, micro), batch, config.micro_batches)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.trained)
    metrics = {"loss": value, "gradient_norm": optax.tree.norm(grads), "tokens": context.totals["present"], **parts}
    state = dataclasses.replace(
      state,
      trained=optax.apply_updates(state.trained, updates),
      optimizer=optimizer_state,
      step=state.step + 1,
      terms=next_states(config.terms, context=context, parts=parts),
    )
    return state, metrics

  teacher_shardings = teacher.shardings(mesh) if teacher and needs_teacher(config.terms) else {}
  return jax.jit(
    step,
    in_shardings=(state_shardings, teacher_shardings, batch_sharding(mesh)),
    out_shardings=(state_shardings, replicated(mesh)),
    donate_argnums=0,
  )


def _inputs(
  student: Decoder,
  params: Params,
  teacher: Teacher | None,
  teacher_params: Params,
  batch: Batch,
  config: StepConfig,
) -> LossInputs:
  """Runs student and teacher on a micro-batch, each only if a term needs it, and returns what the terms read."""
  weights, adapters = branch(params, "student"), branch(params, "adapters")
  if adapters:
    weights = lora.apply(weights, adapters=adapters, scale=config.adapter_scale)
  output = signal = None
  if needs_student(config.terms):
    output = student.apply(
      weights,
      tokens=batch.tokens,
      segments=batch.segments,
      positions=batch.positions,
      capture=student_capture(config.terms),
      dtype=config.dtype,
      remat=config.remat,
    )
  if needs_teacher(config.terms):
    assert teacher is not None, "a term needs a teacher, but none is given"
    signal = teacher.signal(teacher_params, batch=batch, capture=teacher_capture(config.terms), dtype=config.dtype)

  def run_isolated(method: Callable[..., Any], *, inputs: Sequence[Any], layers: Sequence[int]) -> tuple[Any, ...]:
    return student.run_isolated(
      weights,
      run=method,
      inputs=inputs,
      layers=layers,
      segments=batch.segments,
      positions=batch.positions,
      dtype=config.dtype,
    )

  return LossInputs(
    batch=batch, output=output, signal=signal, params=branch(params, TERM_PARAMS), run_isolated=run_isolated
  )


def _accumulated(one: Callable[[Batch], Any], batch: Batch, parts: int) -> Any:
  """Calls `one` on each of `parts` micro-batches in turn; returns the sum of the resulting pytrees."""
  if parts == 1:
    return one(batch)

  def body(sums, micro):
    return jax.tree.map(jnp.add, sums, one(micro)), None

  micros = _split(batch, parts)
  shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], micros))
  zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return jax.lax.scan(body, zero, micros)[0]


def _split(batch: Batch, parts: int) -> Batch:
  """Splits [B, T] into [parts, B / parts, T]. Each part takes every parts-th row, so no row moves between devices."""

  def cut(x: Array) -> Array:
    x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    return constrain(x, (None, "batch", *[None] * (x.ndim - 2)))

  return jax.tree.map(cut, batch)


def canonical_names(student: Decoder, params: Iterable[str]) -> dict[str, list[str]]:
  """Returns stacked name -> canonical names, one for each layer that the stacked parameter holds.

  Prefixes such as `student.` stay. The regex rules of a recipe are matched against canonical names.
  """
  names: dict[str, list[str]] = {}
  for name in params:
    top, rest = name.split(".", 1)
    names[name] = [f"{top}.{one}" for one in student.canonical(rest)]
  return names
