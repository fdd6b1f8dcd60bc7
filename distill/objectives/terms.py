"""Terms of an objective, as data."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from distill.errors import InputError
from distill.losses.divergences import DIVERGENCES
from distill.losses.layer_distances import cosine, relative_mse
from distill.schedules import Schedule, schedule
from distill.types import Capture, before

DISTANCES = {"mse": relative_mse, "cosine": cosine}
# Terms that compare layers by pairs: the first and last end to end, the others fed the teacher's input of the layer.
END_TO_END, MIXER, BLOCK, RELATIONS = "hidden", "mixer_output", "block_output", "relations"
LAYERWISE = (END_TO_END, MIXER, BLOCK, RELATIONS)
_LOGITS = {"weight", "temperature", "temperature_squared"}
_DECOUPLED = {"alpha": 1.0, "beta": 1.0}
_TAID = {"t_start": 0.4, "t_end": 1.0, "alpha": 5e-4}
# Numbers of each divergence, and their defaults.
_NUMBERS = {**{name: numbers for name, (_, numbers) in DIVERGENCES.items()}, "dkd": _DECOUPLED, "taid": _TAID}
_FIELDS = {
  **{name: _LOGITS | set(numbers) for name, numbers in _NUMBERS.items()},
  "cross_entropy": {"weight"},
  "z_loss": {"weight"},
  "balance": {"weight"},
  **{name: {"weight", "pairs", "distance", "balanced"} for name in (END_TO_END, MIXER, BLOCK)},
  RELATIONS: {"weight", "pairs", "heads", "balanced"},
}
_ALONE = ("cross_entropy", "z_loss", "balance")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term:
  """One summand of the loss.

  Attributes:
    kind: A divergence (losses/divergences.py, dkd, taid), cross_entropy, z_loss, balance (of mixtures), hidden,
      mixer_output, block_output or relations.
    weight: Factor of the term's mean over valid tokens.
    temperature: Divides both logits of a divergence.
    temperature_squared: Multiply the divergence by the temperature's square (Hinton et al. 2015, 1503.02531).
    pairs: (student layer, teacher layer) of each comparison, whose mean counts. `hidden` compares their outputs when
      both models run end to end, `relations` the relations among their positions (`losses.hidden.relation_kl`). For the
      other two the student's layer is given the teacher's input of that layer:
      `mixer_output` compares what the mixers add to the residual stream, `block_output` what comes out of the layer and
      of the teacher's; there a third number names a later layer of the teacher's that the student's stands for as well.
      In a configuration also 'uniform': each layer of the student with its share of the teacher's; or {'last': k}.
    heads: Relation heads that queries, keys and values of both models are cut into.
    distance: 'mse' relative to the teacher's norm, or 'cosine'.
    balanced: Multiply the weight by the loss of the stage's terms of logits over this one's value, as they were a step
      before (at the first step by 1), so that the two pull alike.
    numbers: What a divergence calls alpha, beta and the like.
  """

  kind: str
  weight: Schedule
  temperature: Schedule
  temperature_squared: bool = True
  pairs: tuple[tuple[int, ...], ...] = ()
  heads: int = 8
  distance: str = "mse"
  balanced: bool = False
  numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)


def build_terms(
  specs: Sequence[Mapping[str, Any]],
  *,
  key: str,
  steps: int,
  layers_from: Sequence[int] = (),
  depths: tuple[int, int],
) -> tuple[Term, ...]:
  """Terms of a stage from its configuration.

  Args:
    specs: The terms.
    key: Their key, for messages.
    steps: Length of the stage.
    layers_from: Teacher layer that each student layer starts from: what terms without pairs pair.
    depths: Layers of the student and of the teacher.

  Raises:
    InputError: Unknown kind or field, or pairs that are missing or name a layer that is not there.
  """
  terms = []
  for index, spec in enumerate(specs):
    where = f"{key}[{index}]"
    if not isinstance(spec, Mapping):
      raise InputError(f"{where}: {spec!r}; a term is a dict with a kind")
    fields = dict(spec)
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in _FIELDS:
      raise InputError(f"{where}.kind: unknown term {kind!r}; use one of {', '.join(_FIELDS)}")
    if unknown := set(fields) - _FIELDS[kind]:
      raise InputError(f"{where}.{min(unknown)}: not a field of {kind}; it has {', '.join(sorted(_FIELDS[kind]))}")
    fields["numbers"] = _numbers(kind, fields, where=where)
    if str(fields.get("distance", "mse")) not in DISTANCES:
      raise InputError(f"{where}.distance: {fields['distance']!r}; use one of {', '.join(DISTANCES)}")
    heads = fields.get("heads", 1)
    if type(heads) is not int or heads < 1:
      raise InputError(f"{where}.heads: {heads!r}; give the number of relation heads")
    for name in ("weight", "temperature"):
      fields[name] = schedule(fields.get(name, 1.0), key=f"{where}.{name}", steps=steps)
    if kind in LAYERWISE:
      given = _spread(kind, fields.get("pairs"), depths=depths) or _default_pairs(kind, layers_from, depth=depths[1])
      fields["pairs"] = _pairs(kind, given, depths=depths, where=f"{where}.pairs")
    terms.append(Term(kind=kind, **fields))
  if not terms:
    raise InputError(f"{key}: a stage needs at least one term")
  for index, term in enumerate(terms):
    if type(term.balanced) is not bool:
      raise InputError(f"{key}[{index}].balanced: {term.balanced!r}; use True or False")
    if term.balanced and not any(is_logits(one.kind) for one in terms):
      raise InputError(f"{key}[{index}].balanced: the stage has no term of logits to balance it with")
  return tuple(terms)


def _default_pairs(kind: str, layers_from: Sequence[int], *, depth: int) -> list[tuple[int, ...]]:
  """Each student layer with the teacher's that it starts from; outputs, with all those up to the next one's."""
  if not layers_from or any(b <= a for a, b in zip(layers_from, layers_from[1:], strict=False)):
    return []
  if kind in (MIXER, RELATIONS):
    return list(enumerate(layers_from))
  first, last = (0, *layers_from[1:]), (*(j - 1 for j in layers_from[1:]), depth - 1)
  return [(i, *(span if kind == BLOCK else span[1:])) for i, span in enumerate(zip(first, last, strict=True))]


def _spread(kind: str, given: Any, *, depths: tuple[int, int]) -> Any:
  """Pairs that are named by how layers spread, listed; any others as they are."""
  student, teacher = depths
  if given == "uniform":
    firsts = [i * teacher // student for i in range(student)]
    lasts = [max(first, (i + 1) * teacher // student - 1) for i, first in enumerate(firsts)]
    chosen = {MIXER: (firsts,), RELATIONS: (firsts,), BLOCK: (firsts, lasts), END_TO_END: (lasts,)}[kind]
    return list(zip(range(student), *chosen, strict=True))
  if isinstance(given, Mapping) and set(given) == {"last"} and type(given["last"]) is int and given["last"] > 0:
    return [(student - k, teacher - k) for k in range(given["last"], 0, -1)]
  return given


def _pairs(kind: str, given: Any, *, depths: tuple[int, int], where: str) -> tuple[tuple[int, ...], ...]:
  if not given:
    raise InputError(
      f"{where}: a {kind} term needs ((student layer, teacher layer), …) unless student.layers_from names them in order"
    )
  listed = isinstance(given, list | tuple) and all(isinstance(pair, list | tuple) for pair in given)
  if not listed or not all(type(layer) is int for pair in given for layer in pair):
    raise InputError(f"{where}: {given!r}; give ((student layer, teacher layer), …), 'uniform' or {{'last': k}}")
  pairs = tuple(map(tuple, given))
  for pair in pairs:
    if len(pair) != 2 and not (kind == BLOCK and len(pair) == 3):
      raise InputError(f"{where}: {pair}; give (student layer, teacher layer)")
    inside = 0 <= pair[0] < depths[0] and all(0 <= layer < depths[1] for layer in pair[1:])
    if pair[1] > pair[-1]:
      raise InputError(f"{where}: {pair} ends at a layer of the teacher's before the one that it begins at")
    if not inside:
      raise InputError(
        f"{where}: {pair} names a layer that is not there; the student has layers 0 to {depths[0] - 1}, "
        f"the teacher 0 to {depths[1] - 1}"
      )
  return pairs


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demands:
  """The activations that the terms of a stage need.

  Attributes:
    output: Whether the student runs end to end.
    mixture: Whether the student has to have MoE layers.
    student: Activations of the student, run end to end.
    teacher: Activations of the teacher.
    mixers: (student layer, teacher layer whose input it is given) of mixers that run in isolation.
    blocks: The same of whole layers.
  """

  output: bool
  mixture: bool
  student: Capture
  teacher: Capture
  mixers: tuple[tuple[int, int], ...]
  blocks: tuple[tuple[int, int], ...]


def demands(terms: Sequence[Term]) -> Demands:
  """Returns what `terms` need, each thing once."""

  def pairs(*kinds: str) -> list[tuple[int, ...]]:
    return [pair for term in terms if term.kind in kinds for pair in term.pairs]

  given = [before(pair[1]) for pair in pairs(MIXER, BLOCK)]
  compared = [pair[-1] for pair in pairs(END_TO_END, BLOCK)]
  return Demands(
    output=any(term.kind not in (MIXER, BLOCK) for term in terms),
    mixture=any(term.kind == "balance" for term in terms),
    student=Capture(
      layers=tuple(pair[0] for pair in pairs(END_TO_END)), qkv=tuple(pair[0] for pair in pairs(RELATIONS))
    ),
    teacher=Capture(
      layers=(*given, *compared),
      mixers=tuple(pair[1] for pair in pairs(MIXER)),
      qkv=tuple(pair[1] for pair in pairs(RELATIONS)),
    ),
    mixers=tuple(sorted({pair[:2] for pair in pairs(MIXER)})),  # type: ignore[misc]
    blocks=tuple(sorted({pair[:2] for pair in pairs(BLOCK)})),  # type: ignore[misc]
  )


def needs_teacher(terms: Sequence[Term]) -> bool:
  """Whether any term looks at a teacher."""
  return any(term.kind not in _ALONE for term in terms)


def uses_teacher(specs: Any) -> bool:
  """The same of terms that are still a configuration; `build_terms` says what is wrong with them."""
  return isinstance(specs, list | tuple) and any(
    isinstance(spec, Mapping) and spec.get("kind") not in _ALONE for spec in specs
  )


def is_divergence(kind: str) -> bool:
  """Whether terms of this kind compare logits with the teacher's."""
  return kind in _NUMBERS


def is_logits(kind: str) -> bool:
  """Whether terms of this kind learn from logits: the teacher's, or the text's tokens."""
  return is_divergence(kind) or kind == "cross_entropy"


def pairs_missing(spec: Any) -> bool:
  """Whether a term that compares layers leaves the pairs to `layers_from`."""
  return isinstance(spec, Mapping) and spec.get("kind") in LAYERWISE and not spec.get("pairs")


def projector_shapes(terms: Sequence[Term], *, student_width: int, teacher_width: int) -> dict[str, tuple[int, int]]:
  """Shape of the projector from each compared student layer into the teacher's width, where a hidden term compares."""
  return {f"{i}_{j}.kernel": (student_width, teacher_width) for i, j in end_to_end(terms)}


def end_to_end(terms: Sequence[Term]) -> list[tuple[int, int]]:
  """(student layer, teacher layer) of layers compared when both models run end to end."""
  return [(pair[0], pair[1]) for term in terms if term.kind == END_TO_END for pair in term.pairs]
