"""The one training step: pure, jitted once a stage, with explicit shardings and donated state."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from distill.adapters import lora
from distill.models.decoder import Decoder
from distill.models.layer import Layer
from distill.objectives.objective import IsolatedOutputs, LossContext, TermStates, counts, loss_sums, next_states
from distill.objectives.terms import Demands, Term, demands, needs_teacher
from distill.parallel.mesh import LOGICAL_TO_MESH, batch_sharding, batch_shards, replicated
from distill.teachers.teacher import Teacher
from distill.tree import Params
from distill.types import Batch, before

Metrics = dict[str, Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
  """Everything a step changes, and the parameters it leaves alone.

  Attributes:
    trained: `student.…`, `adapters.…` and `projectors.…`, stacked, that the stage trains.
    frozen: The others.
    optimizer: State of the optimizer, for `trained`.
    step: Steps done within the stage.
    terms: What terms of the objective carry from step to step.
  """

  trained: Params
  frozen: Params
  optimizer: Any
  step: Int[Array, ""]
  terms: TermStates

  @property
  def params(self) -> Params:
    """All parameters, trained or not."""
    return {**self.frozen, **self.trained}


def branch(params: Mapping[str, Any], name: str) -> Params:
  """The parameters under `name.`, without that prefix."""
  return {key[len(name) + 1 :]: value for key, value in params.items() if key.startswith(f"{name}.")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
  """What is fixed when a step is compiled.

  Attributes:
    terms: Terms of the stage.
    steps: Length of the stage.
    micro_batches: Parts of a batch whose gradients are added up before the update.
    dtype: Dtype of the operands; sums and parameters are float32.
    adapter_scale: alpha / rank of the adapters that train, if any do.
    remat: Remat policy of the student, a key of `REMAT_POLICIES`.
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
  """step(state, teacher parameters, batch) -> (state, metrics), jitted; the state given is donated."""
  loss = functools.partial(_loss, student=student, teacher=teacher, config=config, shards=batch_shards(mesh))
  gradient = jax.value_and_grad(loss, has_aux=True)

  def step(state: TrainState, teacher_params: Params, batch: Batch) -> tuple[TrainState, Metrics]:
    totals = counts(batch)

    def one(micro):
      return gradient(state.trained, state, teacher_params, micro, totals)

    (value, parts), grads = _accumulated(one, batch, config.micro_batches, mesh)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.trained)
    metrics = {"loss": value, "gradient_norm": optax.tree.norm(grads), "tokens": totals["present"], **parts}
    state = dataclasses.replace(
      state,
      trained=optax.apply_updates(state.trained, updates),
      optimizer=optimizer_state,
      step=state.step + 1,
      terms=next_states(
        config.terms, state.terms, parts=parts, step=state.step, progress=(state.step + 1) / config.steps
      ),
    )
    return state, metrics

  teacher_shardings = teacher.shardings(mesh) if teacher and needs_teacher(config.terms) else {}
  return jax.jit(
    step,
    in_shardings=(state_shardings, teacher_shardings, batch_sharding(mesh)),
    out_shardings=(state_shardings, replicated(mesh)),
    donate_argnums=0,
  )


def _loss(trained, state, teacher_params, batch, totals, *, student, teacher, config, shards):
  """A micro-batch's share of the loss, and of each term."""
  wanted = demands(config.terms)
  params = {**state.frozen, **trained}
  weights, adapters = branch(params, "student"), branch(params, "adapters")
  if adapters:
    weights = lora.apply(weights, adapters=adapters, scale=config.adapter_scale)
  output = signal = None
  if wanted.output:
    output = student.apply(
      weights,
      tokens=batch.tokens,
      segments=batch.segments,
      positions=batch.positions,
      capture=wanted.student,
      dtype=config.dtype,
      remat=config.remat,
    )
  if needs_teacher(config.terms):
    assert teacher is not None
    signal = teacher.signal(teacher_params, batch=batch, capture=wanted.teacher, dtype=config.dtype)
  return loss_sums(
    config.terms,
    output=output,
    signal=signal,
    isolated=_isolated(student, weights, wanted, signal, batch=batch, dtype=config.dtype),
    batch=batch,
    projectors=branch(params, "projectors"),
    context=LossContext(step=state.step, totals=totals, states=state.terms, shards=shards),
  )


def _accumulated(one: Callable[[Batch], Any], batch: Batch, parts: int, mesh: Mesh) -> Any:
  """The sum of `one` over the parts of a batch, one after another."""
  if parts == 1:
    return one(batch)

  def body(sums, micro):
    return jax.tree.map(jnp.add, sums, one(micro)), None

  micros = _split(batch, parts, mesh)
  shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], micros))
  zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return jax.lax.scan(body, zero, micros)[0]


def _isolated(student: Decoder, weights: Params, wanted: Demands, signal, *, batch: Batch, dtype: Any):
  """Runs student layers on the teacher's inputs."""

  def run(method, pairs):
    outputs = student.run_isolated(
      weights,
      run=method,
      inputs=[jax.lax.stop_gradient(signal.layers[before(j)]) for _, j in pairs],
      layers=[i for i, _ in pairs],
      segments=batch.segments,
      positions=batch.positions,
      dtype=dtype,
    )
    return dict(zip(pairs, outputs, strict=True))

  return IsolatedOutputs(mixers=run(Layer.mix, wanted.mixers), blocks=run(Layer.__call__, wanted.blocks))


def _split(batch: Batch, parts: int, mesh: Mesh) -> Batch:
  """[B, T] -> [parts, B / parts, T]; part i takes every parts-th row, so that no row changes its device."""
  spec = NamedSharding(mesh, PartitionSpec(None, LOGICAL_TO_MESH["batch"]))

  def cut(x: Array) -> Array:
    x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(x, spec)

  return jax.tree.map(cut, batch)


def canonical_names(student: Decoder, params: Iterable[str]) -> dict[str, list[str]]:
  """Stacked name with its branch -> canonical names of its layers, for regex lists."""
  names: dict[str, list[str]] = {}
  for name in params:
    top, rest = name.split(".", 1)
    names[name] = [f"{top}.{one}" for one in student.canonical(rest)]
  return names
