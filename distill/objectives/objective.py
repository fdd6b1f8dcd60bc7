"""The objective of a stage: the weighted sum of its terms."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Key

from distill.losses.chunked import chunked_losses
from distill.losses.token_losses import TokenLoss
from distill.objectives.term import LossContext, LossInputs, Scalar, Setting, Term, TermState
from distill.tree import Params
from distill.types import NO_CAPTURE, Batch, Capture


def needs_student(terms: Sequence[Term]) -> bool:
  """Returns True if any term needs the student to run end to end."""
  return any(term.runs_student for term in terms)


def needs_teacher(terms: Sequence[Term]) -> bool:
  """Returns True if any term needs a teacher."""
  return any(term.runs_teacher for term in terms)


def student_capture(terms: Sequence[Term]) -> Capture:
  """Returns a request to capture all student activations that any of the terms reads."""
  return _union([term.student_capture() for term in terms])


def teacher_capture(terms: Sequence[Term]) -> Capture:
  """Returns a request to capture all teacher activations that any of the terms reads."""
  return _union([term.teacher_capture() for term in terms])


def _union(captures: Sequence[Capture]) -> Capture:
  found = NO_CAPTURE
  for capture in captures:
    found = found | capture
  return found


def init_params(terms: Sequence[Term], setting: Setting, *, key: Key[Array, ""]) -> Params:
  """Returns the initial values of the parameters that the terms themselves train, such as projectors, by name.

  Args:
    terms: Terms of the stage.
    setting: The stage and the two models, which decide the shapes.
    key: Random key; every term gets the same one.
  """
  return {name: value for term in terms for name, value in term.init_params(setting, key=key).items()}


def initial_states(terms: Sequence[Term]) -> dict[str, TermState]:
  """Returns the initial state of each term that has one, by the term's index in the stage, written as a string."""
  states = {str(index): term.initial_state() for index, term in enumerate(terms)}
  return {index: state for index, state in states.items() if state}


def next_states(terms: Sequence[Term], *, context: LossContext, parts: Mapping[str, Scalar]) -> dict[str, TermState]:
  """Returns the terms' states after a step, by the term's index in the stage, written as a string.

  Args:
    terms: Terms of the stage.
    context: Step, counts and term states that the step's loss was computed with.
    parts: Mean of each term over the global batch, by the term's name in metrics, such as `0_forward_kl`.
  """
  names = _names(terms)
  reference = sum(
    (context.at(term.weight) * parts[name] for term, name in zip(terms, names, strict=True) if term.reference),
    start=jnp.zeros((), jnp.float32),
  )
  return {
    index: terms[int(index)].next_state(state, value=parts[names[int(index)]], reference=reference, context=context)
    for index, state in context.states.items()
  }


def counts(batch: Batch) -> dict[str, Scalar]:
  """Returns two counts of a batch: tokens with a target, `predicted`, and tokens that are not padding, `present`."""
  return {"predicted": jnp.sum(batch.loss_mask), "present": jnp.sum(batch.segments > 0).astype(jnp.float32)}


def loss_sums(terms: Sequence[Term], inputs: LossInputs, *, context: LossContext) -> tuple[Scalar, dict[str, Scalar]]:
  """Computes a micro-batch's contribution to the loss and to each term's mean over the global batch.

  Args:
    terms: Terms of the stage.
    inputs: The micro-batch, with the outputs of both models that the terms need.
    context: Step of the stage, counts of the global batch, and term states.

  Returns:
    (contribution to the loss, which is Σ weight · `Term.factor` · mean; name of a term in metrics -> contribution to
    the term's mean). The name is the term's index and kind, such as `0_forward_kl`.
  """
  token_losses: dict[int, TokenLoss] = {}
  scales: dict[int, Scalar] = {}
  total, values = jnp.zeros((), jnp.float32), {}
  for index, term in enumerate(terms):
    state = context.states.get(str(index), {})
    weight = context.at(term.weight) * term.factor(state)
    token_loss = term.token_loss(context, state)
    if token_loss is None:
      values[index] = term.loss(inputs, context)
      total = total + weight * values[index]
    else:
      # The shared walk sums over tokens. value = scale * sum, where scale = TokenLoss.weight / predicted tokens.
      scale = (1.0 / jnp.maximum(context.totals["predicted"], 1.0)) * token_loss.weight
      scales[index] = scale
      token_losses[index] = dataclasses.replace(token_loss, weight=weight * scale)
  if token_losses:
    token_total, sums = _shared_walk(list(token_losses.values()), inputs, shards=context.shards)
    total = total + token_total
    for index, token_sum in zip(token_losses, sums, strict=True):
      values[index] = token_sum * scales[index]
  return total, {name: values[index] for index, name in enumerate(_names(terms))}


def _names(terms: Sequence[Term]) -> list[str]:
  """Returns the name of each term in metrics: its index and kind, such as `0_forward_kl`."""
  return [f"{index}_{term.kind}" for index, term in enumerate(terms)]


def _shared_walk(losses, inputs: LossInputs, *, shards: int):
  """Computes all token losses in one pass over the logits.

  Args:
    losses: The token losses of the stage, a sequence of `TokenLoss`.
    inputs: The micro-batch, with the student's output and the teacher's signal.
    shards: Number of parts of the mesh that the batch's rows are spread over.

  Returns:
    (weighted total of all losses, [losses] unweighted sum of each loss over the tokens of the micro-batch).
  """
  output, batch = inputs.output, inputs.batch
  assert output is not None, "a term that is a loss of logits needs the student's output"
  target, readout = (None, None) if inputs.signal is None else inputs.signal.target_rows()
  return chunked_losses(
    losses,
    hidden=output.hidden.reshape(-1, output.hidden.shape[-1]),
    readout=output.readout,
    target=target,
    teacher_readout=readout,
    labels=jnp.roll(batch.tokens, -1, axis=1).reshape(-1),
    mask=batch.loss_mask.reshape(-1),
    shards=shards,
  )
