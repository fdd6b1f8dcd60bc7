"""The objective: terms are data, and this is the only file that knows about distillation as a whole."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distill.errors import InputError
from distill.losses.chunked import chunked_cross_entropy, chunked_divergence, chunked_z_loss
from distill.losses.divergences import DIVERGENCES, Divergence, decoupled_kl, taid
from distill.losses.hidden import cosine, relative_mse
from distill.schedules import Schedule, schedule
from distill.tree import Params
from distill.types import Batch, DenseSignal, ModelOutput

_DISTANCES = {"mse": relative_mse, "cosine": cosine}
_LOGITS = {"weight", "temperature", "temperature_squared"}
_DECOUPLED = {"alpha": 1.0, "beta": 1.0}
_TAID = {"t_start": 0.4, "t_end": 1.0, "alpha": 5e-4}
# Numbers of each divergence, and their defaults.
_NUMBERS = {**{name: numbers for name, (_, numbers) in DIVERGENCES.items()}, "dkd": _DECOUPLED, "taid": _TAID}
_FIELDS = {
  **{name: _LOGITS | set(numbers) for name, numbers in _NUMBERS.items()},
  "cross_entropy": {"weight"},
  "z_loss": {"weight"},
  "hidden": {"weight", "pairs", "distance"},
  "balance": {"weight"},
}
_ALONE = ("cross_entropy", "z_loss", "balance")

Sums = dict[str, Float[Array, ""]]
TermStates = dict[str, dict[str, Float[Array, ""]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term:
  """One summand of the loss.

  Attributes:
    kind: A divergence (losses/divergences.py, dkd, taid), cross_entropy, z_loss, hidden or balance (of mixtures).
    weight: Factor of the term's mean over valid tokens.
    temperature: Divides both logits of a divergence.
    temperature_squared: Multiply the divergence by the temperature's square (Hinton et al. 2015, 1503.02531).
    pairs: (student layer, teacher layer) of each compared pair (hidden); the mean over pairs counts.
    distance: 'mse' relative to the teacher's norm, or 'cosine' (hidden).
    numbers: What a divergence calls alpha, beta and the like.
  """

  kind: str
  weight: Schedule
  temperature: Schedule
  temperature_squared: bool = True
  pairs: tuple[tuple[int, int], ...] = ()
  distance: str = "mse"
  numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)


def build_terms(specs: Sequence[Mapping[str, Any]], *, key: str, steps: int) -> tuple[Term, ...]:
  """Terms of a stage from its configuration.

  Raises:
    InputError: Unknown kind or field, or a hidden term without pairs.
  """
  terms = []
  for index, spec in enumerate(specs):
    fields, where = dict(spec), f"{key}[{index}]"
    kind = fields.pop("kind", None)
    if kind not in _FIELDS:
      raise InputError(f"{where}.kind: unknown term {kind!r}; use one of {', '.join(_FIELDS)}")
    if unknown := set(fields) - _FIELDS[kind]:
      raise InputError(f"{where}.{min(unknown)}: not a field of {kind}; it has {', '.join(sorted(_FIELDS[kind]))}")
    fields["numbers"] = _numbers(kind, fields, where=where)
    if fields.get("distance", "mse") not in _DISTANCES:
      raise InputError(f"{where}.distance: {fields['distance']!r}; use one of {', '.join(_DISTANCES)}")
    for name in ("weight", "temperature"):
      fields[name] = schedule(fields.get(name, 1.0), key=f"{where}.{name}", steps=steps)
    fields["pairs"] = tuple((int(i), int(j)) for i, j in fields.get("pairs", ()))
    if kind == "hidden" and not fields["pairs"]:
      raise InputError(f"{where}.pairs: a hidden term needs ((student layer, teacher layer), …)")
    terms.append(Term(kind=kind, **fields))
  if not terms:
    raise InputError(f"{key}: a stage needs at least one term")
  return tuple(terms)


def _numbers(kind: str, fields: dict[str, Any], *, where: str) -> dict[str, float]:
  """Takes a divergence's numbers out of the fields of its term."""
  numbers = {}
  for name, default in _NUMBERS.get(kind, {}).items():
    value = fields.pop(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
      raise InputError(f"{where}.{name}: {value!r} is not a number")
    numbers[name] = float(value)
  low, high = (-math.inf, math.inf) if kind in ("alpha_beta", "dkd") else (0.0, 1.0)
  for name, value in numbers.items():
    if not low <= value <= high or not math.isfinite(value) or (kind.startswith("skew") and value == 1.0):
      raise InputError(f"{where}.{name}: {value} is outside of what {kind} is defined for, 0 to 1")
  if kind == "alpha_beta" and (numbers["alpha"] + numbers["beta"] == 0 or not any(numbers.values())):
    raise InputError(f"{where}: alpha + beta must not be 0")
  return numbers


def initial_states(terms: Sequence[Term]) -> TermStates:
  """What terms carry from step to step, before the first: TAID's t, momentum m and the last value."""
  return {
    str(index): {"t": jnp.float32(term.numbers["t_start"]), "momentum": jnp.float32(0.0), "last": jnp.float32(jnp.inf)}
    for index, term in enumerate(terms)
    if term.kind == "taid"
  }


def next_states(terms: Sequence[Term], states: TermStates, *, parts: Sums, progress: Float[Array, ""]) -> TermStates:
  """States after a step whose global term means are `parts`, with `progress` of the stage, 0 to 1, behind it.

  t never falls behind a straight line, and runs ahead of it while the loss falls (2501.16937, algorithm 1).
  """
  after = {}
  for key, state in states.items():
    numbers, value = terms[int(key)].numbers, parts[f"{key}_taid"]
    fallen = jnp.where(jnp.isfinite(state["last"]), (state["last"] - value) / state["last"], 0.0)
    momentum = 0.99 * state["momentum"] + 0.01 * fallen
    line = numbers["t_start"] + (numbers["t_end"] - numbers["t_start"]) * progress
    ahead = state["t"] + numbers["alpha"] * jax.nn.sigmoid(momentum) * (1.0 - state["t"])
    t = jnp.minimum(numbers["t_end"], jnp.maximum(line, ahead))
    after[key] = {"t": t, "momentum": momentum, "last": value}
  return after


def captured_layers(terms: Sequence[Term]) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """(student layers, teacher layers) whose outputs the hidden terms compare, each once, in order."""
  pairs = [pair for term in terms for pair in term.pairs]
  return tuple(sorted({i for i, _ in pairs})), tuple(sorted({j for _, j in pairs}))


def needs_teacher(terms: Sequence[Term]) -> bool:
  """Whether any term looks at a teacher."""
  return any(term.kind not in _ALONE for term in terms)


def needs_mixture(terms: Sequence[Term]) -> bool:
  """Whether any term looks at how a student's tokens use its experts."""
  return any(term.kind == "balance" for term in terms)


def counts(batch: Batch) -> Sums:
  """Valid tokens of a batch: `predicted` (targets) and `present` (not padding)."""
  return {"predicted": jnp.sum(batch.loss_mask), "present": jnp.sum(batch.segments > 0).astype(jnp.float32)}


def projector_shapes(terms: Sequence[Term], *, student_width: int, teacher_width: int) -> dict[str, tuple[int, int]]:
  """Shape of the projector from each compared student layer into the teacher's width, where a hidden term compares."""
  return {f"{i}_{j}.kernel": (student_width, teacher_width) for term in terms for i, j in term.pairs}


def loss_sums(
  terms: Sequence[Term],
  *,
  output: ModelOutput,
  signal: DenseSignal | None,
  batch: Batch,
  projectors: Params,
  step: Float[Array, ""] | Int[Array, ""],
  totals: Sums,
  states: TermStates,
) -> tuple[Float[Array, ""], Sums]:
  """This micro-batch's share of the loss, and of each term's mean.

  Args:
    terms: Terms of the stage.
    output: The student's output.
    signal: The teacher's, if any term needs it.
    batch: The micro-batch.
    projectors: `{i}_{j}.kernel` [D_s, D_t] for each compared pair; none where the widths agree and none is trained.
    step: Step within the stage.
    totals: `counts` of the GLOBAL batch, so that shares of micro-batches, devices and hosts simply add up.
    states: What terms carry from step to step (`initial_states`).

  Returns:
    Σ weight · sum / count, and per term sum / count.
  """
  total, parts = jnp.zeros((), jnp.float32), {}
  for index, term in enumerate(terms):
    if term.kind == "hidden":
      value = _hidden_sum(term, terms, output, signal, batch, projectors) / totals["present"]
    elif term.kind == "balance":
      assert output.balance is not None, "a student without mixtures"
      value = jnp.sum(output.balance * jnp.sum(batch.segments > 0, axis=1)) / totals["present"]
    else:
      value = _token_sum(term, output, signal, batch, step, states.get(str(index))) / jnp.maximum(
        totals["predicted"], 1.0
      )
    total = total + term.weight(step) * value
    parts[f"{index}_{term.kind}"] = value
  return total, parts


def _token_sum(term, output, signal, batch, step, state):
  def rows(x):
    return x.reshape(-1, *x.shape[2:])

  hidden, mask = rows(output.hidden), rows(batch.loss_mask)
  labels = rows(jnp.roll(batch.tokens, -1, axis=1))
  if term.kind == "cross_entropy":
    return chunked_cross_entropy(hidden, output.readout, labels, mask)
  if term.kind == "z_loss":
    return chunked_z_loss(hidden, output.readout, mask)
  divergence, extra = _divergence(term), ()
  if term.kind == "taid":
    extra = (state["t"],)
  temperature = term.temperature(step)
  value = chunked_divergence(
    divergence,
    hidden=hidden,
    readout=output.readout,
    target=rows(signal.hidden),
    teacher_readout=signal.readout,
    labels=labels if term.kind == "dkd" else None,
    mask=mask,
    temperature=temperature,
    extra=extra,
  )
  return value * jnp.square(temperature) if term.temperature_squared else value


def _divergence(term: Term):
  if term.kind == "taid":
    return lambda p, q, t: taid(p, q, t=t)
  function: Divergence = decoupled_kl if term.kind == "dkd" else DIVERGENCES[term.kind][0]
  return functools.partial(function, **term.numbers)


def _hidden_sum(term, terms, output, signal, batch, projectors):
  student_layers, teacher_layers = captured_layers(terms)
  present = (batch.segments > 0).astype(jnp.float32)
  total = jnp.zeros((), jnp.float32)
  for i, j in term.pairs:
    student = output.captured[student_layers.index(i)]
    teacher = signal.captured[teacher_layers.index(j)]
    if f"{i}_{j}.kernel" in projectors:
      rows = student.reshape(-1, student.shape[-1])
      student = jnp.matmul(rows, projectors[f"{i}_{j}.kernel"]).reshape(*student.shape[:-1], -1)
    total = total + jnp.sum(present * _DISTANCES[term.distance](student, jax.lax.stop_gradient(teacher)))
  return total / len(term.pairs)
