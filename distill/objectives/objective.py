"""The objective: the only file that knows about distillation as a whole."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distill.losses.chunked import chunked_losses
from distill.losses.divergences import DIVERGENCES, Divergence, decoupled_kl, taid
from distill.losses.layer_distances import relation_kl
from distill.losses.token_losses import TokenLoss, cross_entropy_loss, divergence_loss, z_loss
from distill.objectives.terms import (
  BLOCK,
  DISTANCES,
  END_TO_END,
  LAYERWISE,
  MIXER,
  RELATIONS,
  Term,
  is_divergence,
  is_logits,
)
from distill.tree import Params
from distill.types import Batch, ModelOutput, TeacherSignal

Sums = dict[str, Float[Array, ""]]
TermStates = dict[str, dict[str, Float[Array, ""]]]


def initial_states(terms: Sequence[Term]) -> TermStates:
  """What terms carry from step to step, before the first: TAID's t, contextum m and last value; a balance's ratio."""
  states = {}
  for index, term in enumerate(terms):
    if term.kind == "taid":
      start = jnp.float32(term.numbers["t_start"])
      states[str(index)] = {"t": start, "contextum": jnp.float32(0.0), "last": jnp.float32(jnp.inf)}
    if term.balanced:
      states[str(index)] = {"ratio": jnp.float32(1.0)}
  return states


def next_states(
  terms: Sequence[Term],
  states: TermStates,
  *,
  parts: Sums,
  step: Float[Array, ""] | Int[Array, ""],
  progress: Float[Array, ""],
) -> TermStates:
  """States after step `step` of a stage, whose global term means are `parts`, with `progress` of it, 0 to 1, behind.

  TAID's t never falls behind a straight line, and runs ahead of it while the loss falls (2501.16937, algorithm 1).
  """
  after = {}
  logits = sum(
    term.weight(step) * parts[f"{index}_{term.kind}"] for index, term in enumerate(terms) if is_logits(term.kind)
  )
  for key, state in states.items():
    term = terms[int(key)]
    numbers, value = term.numbers, parts[f"{key}_{term.kind}"]
    if term.balanced:
      ratio = logits / value
      after[key] = {"ratio": jnp.where(jnp.isfinite(ratio), ratio, state["ratio"])}
      continue
    fallen = jnp.where(jnp.isfinite(state["last"]), (state["last"] - value) / state["last"], 0.0)
    contextum = 0.99 * state["contextum"] + 0.01 * fallen
    line = numbers["t_start"] + (numbers["t_end"] - numbers["t_start"]) * progress
    ahead = state["t"] + numbers["alpha"] * jax.nn.sigmoid(contextum) * (1.0 - state["t"])
    t = jnp.minimum(numbers["t_end"], jnp.maximum(line, ahead))
    after[key] = {"t": t, "contextum": contextum, "last": value}
  return after


def counts(batch: Batch) -> Sums:
  """Valid tokens of a batch: `predicted` (targets) and `present` (not padding)."""
  return {"predicted": jnp.sum(batch.loss_mask), "present": jnp.sum(batch.segments > 0).astype(jnp.float32)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossContext:
  """Where a stage stands when a loss is computed.

  Attributes:
    step: Step within the stage.
    totals: `counts` of the GLOBAL batch, so that shares of micro-batches, devices and hosts simply add up.
    states: What terms carry from step to step (`initial_states`).
    shards: Over how many parts of a mesh the rows are spread.
  """

  step: Float[Array, ""] | Int[Array, ""]
  totals: Sums
  states: TermStates
  shards: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class IsolatedOutputs:
  """Outputs of student layers that run on the teacher's inputs, by (student layer, teacher layer)."""

  mixers: Mapping[tuple[int, int], Float[Array, "B T D"]] = dataclasses.field(default_factory=dict)
  blocks: Mapping[tuple[int, int], Float[Array, "B T D"]] = dataclasses.field(default_factory=dict)


def loss_sums(
  terms: Sequence[Term],
  *,
  output: ModelOutput | None,
  signal: TeacherSignal | None,
  isolated: IsolatedOutputs,
  batch: Batch,
  projectors: Params,
  context: LossContext,
) -> tuple[Float[Array, ""], Sums]:
  """This micro-batch's share of the loss, and of each term's mean.

  Args:
    terms: Terms of the stage.
    output: The student's output, if any term needs it.
    signal: The teacher's, if any term needs it.
    isolated: Student layers given the teacher's inputs.
    batch: The micro-batch.
    projectors: `{i}_{j}.kernel` [D_s, D_t] for each compared pair; none where the widths agree and none is trained.
    context: Where the stage stands.

  Returns:
    Σ weight · ratio · sum / count, ratio 1 unless a term is balanced, and per term sum / count.
  """
  total, parts = jnp.zeros((), jnp.float32), {}
  from_logits, values = _from_logits(terms, output, signal, batch, context)
  for index, term in enumerate(terms):
    name = f"{index}_{term.kind}"
    if term.kind in LAYERWISE:
      parts[name] = _layer_sum(term, output, signal, isolated, batch, projectors) / context.totals["present"]
    elif term.kind == "balance":
      assert output is not None and output.balance is not None, "a student without mixtures"
      parts[name] = jnp.sum(output.balance * jnp.sum(batch.segments > 0, axis=1)) / context.totals["present"]
    else:
      parts[name] = values[index]
      continue
    weight = term.weight(context.step) * (context.states[str(index)]["ratio"] if term.balanced else 1.0)
    total = total + weight * parts[name]
  return total + from_logits, parts


def _from_logits(terms, output, signal, batch, context):
  """(weighted sum, {index: value}) of the terms that learn from logits, which share one walk over them."""
  places = [index for index, term in enumerate(terms) if term.kind not in (*LAYERWISE, "balance")]
  if not places:
    return jnp.zeros((), jnp.float32), {}
  # What each term's sum over tokens is multiplied by to become its value.
  scales = [1.0 / jnp.maximum(context.totals["predicted"], 1.0)] * len(places)
  losses = []
  for place, index in enumerate(places):
    term = terms[index]
    if is_divergence(term.kind) and term.temperature_squared:
      scales[place] *= jnp.square(term.temperature(context.step))
    losses.append(_token_loss(term, scale=scales[place], step=context.step, state=context.states.get(str(index))))

  def rows(x):
    return x.reshape(-1, *x.shape[2:])

  target, teacher_readout = (None, None) if signal is None else signal.target_rows()
  total, sums = chunked_losses(
    losses,
    hidden=rows(output.hidden),
    readout=output.readout,
    target=target,
    teacher_readout=teacher_readout,
    labels=rows(jnp.roll(batch.tokens, -1, axis=1)),
    mask=rows(batch.loss_mask),
    shards=context.shards,
  )
  return total, {index: sums[place] * scales[place] for place, index in enumerate(places)}


def _token_loss(term, *, scale, step, state) -> TokenLoss:
  weight = term.weight(step) * scale
  if term.kind == "cross_entropy":
    return cross_entropy_loss(weight=weight)
  if term.kind == "z_loss":
    return z_loss(weight=weight)
  return divergence_loss(
    _divergence(term),
    labelled=term.kind == "dkd",
    weight=weight,
    temperature=term.temperature(step),
    extra=(state["t"],) if term.kind == "taid" else (),
  )


def _divergence(term: Term):
  if term.kind == "taid":
    return lambda p, q, t: taid(p, q, t=t)
  function: Divergence = decoupled_kl if term.kind == "dkd" else DIVERGENCES[term.kind][0]
  return functools.partial(function, **term.numbers) if term.numbers else function  # As itself for `LOGIT_DIVERGENCES`.


def _layer_sum(term, output, signal, isolated, batch, projectors):
  present = (batch.segments > 0).astype(jnp.float32)
  total = jnp.zeros((), jnp.float32)
  for pair in term.pairs:
    i, j = pair[:2]
    if term.kind == RELATIONS:
      mine, theirs = output.qkv[i], signal.qkv[j]
      for student, teacher in zip(mine, theirs, strict=True):
        distance = relation_kl(student, jax.lax.stop_gradient(teacher), segments=batch.segments, heads=term.heads)
        total = total + jnp.sum(present * distance) / len(mine)
      continue
    if term.kind == MIXER:
      student, teacher = isolated.mixers[(i, j)], signal.mixers[j]
    else:
      teacher = signal.layers[pair[-1]]
    if term.kind == BLOCK:
      student = isolated.blocks[(i, j)]
    if term.kind == END_TO_END:
      student = _projected(output.layers[i], projectors.get(f"{i}_{j}.kernel"))
    total = total + jnp.sum(present * DISTANCES[term.distance](student, jax.lax.stop_gradient(teacher)))
  return total / len(term.pairs)


def _projected(x, kernel):
  if kernel is None:
    return x
  return jnp.matmul(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1)
