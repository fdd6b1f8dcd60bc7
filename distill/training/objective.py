"""The objective: terms are data, and this is the only file that knows about distillation as a whole."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distill.errors import InputError
from distill.losses.chunked import chunked_cross_entropy, chunked_forward_kl
from distill.losses.hidden import cosine, relative_mse
from distill.schedules import Schedule, schedule
from distill.tree import Params
from distill.types import Batch, DenseSignal, ModelOutput

_DISTANCES = {"mse": relative_mse, "cosine": cosine}
_FIELDS = {
  "forward_kl": {"weight", "temperature", "temperature_squared"},
  "cross_entropy": {"weight"},
  "hidden": {"weight", "pairs", "distance"},
}

Sums = dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term:
  """One summand of the loss.

  Attributes:
    kind: forward_kl, cross_entropy or hidden.
    weight: Factor of the term's mean over valid tokens.
    temperature: Divides both logits (forward_kl).
    temperature_squared: Multiply the divergence by the temperature's square (Hinton et al. 2015, 1503.02531).
    pairs: (student layer, teacher layer) of each compared pair (hidden); the mean over pairs counts.
    distance: 'mse' relative to the teacher's norm, or 'cosine' (hidden).
  """

  kind: str
  weight: Schedule
  temperature: Schedule
  temperature_squared: bool = True
  pairs: tuple[tuple[int, int], ...] = ()
  distance: str = "mse"


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


def captured_layers(terms: Sequence[Term]) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """(student layers, teacher layers) whose outputs the hidden terms compare, each once, in order."""
  pairs = [pair for term in terms for pair in term.pairs]
  return tuple(sorted({i for i, _ in pairs})), tuple(sorted({j for _, j in pairs}))


def needs_teacher(terms: Sequence[Term]) -> bool:
  """Whether any term looks at a teacher."""
  return any(term.kind != "cross_entropy" for term in terms)


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

  Returns:
    Σ weight · sum / count, and per term sum / count.
  """
  total, parts = jnp.zeros((), jnp.float32), {}
  for index, term in enumerate(terms):
    if term.kind == "hidden":
      value = _hidden_sum(term, terms, output, signal, batch, projectors) / totals["present"]
    else:
      value = _token_sum(term, output, signal, batch, step) / jnp.maximum(totals["predicted"], 1.0)
    total = total + term.weight(step) * value
    parts[f"{index}_{term.kind}"] = value
  return total, parts


def _token_sum(term, output, signal, batch, step):
  def rows(x):
    return x.reshape(-1, *x.shape[2:])

  mask = rows(batch.loss_mask)
  if term.kind == "cross_entropy":
    labels = jnp.roll(batch.tokens, -1, axis=1)
    return chunked_cross_entropy(rows(output.hidden), output.readout, rows(labels), mask)
  temperature = term.temperature(step)
  value = chunked_forward_kl(
    rows(output.hidden), output.readout, rows(signal.hidden), signal.readout, mask, temperature
  )
  return value * jnp.square(temperature) if term.temperature_squared else value


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
