"""Terms that compare layers of the student with layers of the teacher, pair by pair."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import jax.numpy as jnp
from jaxtyping import Array, Float

from distill.configuration import option
from distill.errors import InputError
from distill.losses.layer_distances import cosine, relative_mse
from distill.objectives.context import LossContext, LossInputs, Scalar, Setting, TermState
from distill.objectives.term import Term

DISTANCES: Mapping[str, Callable[..., Float[Array, "B T"]]] = {"mse": relative_mse, "cosine": cosine}

Pairs = tuple[tuple[int, ...], ...]


class Span(NamedTuple):
  """The teacher layers that one student layer stands for: `first` to `last`; it starts from the weights of `source`."""

  source: int
  first: int
  last: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairTerm(Term):
  """A mean over pairs of layers of a distance between their activations, over all tokens but padding.

  A balanced term's state holds the ratio that its weight is multiplied by.
  """

  runs_teacher: ClassVar[bool] = True
  # A third layer in a pair ends the span of teacher layers that the second begins.
  spans: ClassVar[bool] = False

  pairs: Pairs | str | Mapping[str, int] = option(
    (),
    help="((student layer, teacher layer), …); 'uniform' spreads the student's layers over the teacher's, {'last': k} "
    "pairs the last k of each; without pairs student.layers_from decides.",
  )
  balanced: bool = option(
    False,
    help="Multiply the weight by the loss of the stage's logit terms over this term's, both of the step before.",
  )

  def bind(self, setting: Setting, *, key: str) -> "PairTerm":
    """Returns the term with its pairs listed; they stay empty where layers_from decides and is not known yet."""
    if self.balanced and not setting.has_reference:
      raise InputError(f"{key}.balanced: the stage has no term of logits to balance it with")
    pairs = self._spread(setting)
    if not pairs and setting.layers_from is None:
      return self
    return dataclasses.replace(self, pairs=_checked(pairs, term=self, setting=setting, key=f"{key}.pairs"))

  def pair(self, student: int, span: Span) -> tuple[int, ...]:
    """Returns the pair that compares a student layer with the teacher layers it stands for."""
    raise NotImplementedError

  def distances(self, inputs: LossInputs) -> Iterator[Float[Array, "B T"]]:
    """Yields each token's distance for every pair, in order; no gradient flows into the teacher's side."""
    raise NotImplementedError

  @property
  def listed(self) -> Pairs:
    """The pairs of a term that is bound."""
    assert isinstance(self.pairs, tuple), "bind comes first"
    return cast(Pairs, self.pairs)

  def loss(self, inputs: LossInputs, context: LossContext) -> Scalar:
    """Returns the mean over pairs and tokens."""
    present = (inputs.batch.segments > 0).astype(jnp.float32)
    total = jnp.zeros((), jnp.float32)
    for distance in self.distances(inputs):
      total = total + jnp.sum(present * distance)
    return total / len(self.listed) / context.totals["present"]

  def initial_state(self) -> TermState:
    """Returns a ratio of one, if the term is balanced."""
    return {"ratio": jnp.float32(1.0)} if self.balanced else {}

  def next_state(self, state: TermState, *, value: Scalar, reference: Scalar, context: LossContext) -> TermState:
    """Returns the ratio at which this term would have weighed as much as the reference terms."""
    ratio = reference / value
    return {"ratio": jnp.where(jnp.isfinite(ratio), ratio, state["ratio"])}

  def factor(self, state: TermState) -> float | Scalar:
    """Returns the ratio, if the term is balanced."""
    return state["ratio"] if self.balanced else 1.0

  def _spread(self, setting: Setting) -> Any:
    """Returns pairs that are named by a rule as a list, and any others as they are."""
    student, teacher = len(setting.student.layers), setting.teacher_depth
    if not self.pairs:
      return [self.pair(i, span) for i, span in enumerate(_spans(setting.layers_from or (), depth=teacher))]
    if self.pairs == "uniform":
      firsts = [i * teacher // student for i in range(student)]
      lasts = [max(first, (i + 1) * teacher // student - 1) for i, first in enumerate(firsts)]
      spans = [Span(first, first, last) for first, last in zip(firsts, lasts, strict=True)]
      return [self.pair(i, span) for i, span in enumerate(spans)]
    if isinstance(self.pairs, Mapping) and set(self.pairs) == {"last"}:
      count = self.pairs["last"]
      if type(count) is int and count > 0:
        return [(student - k, teacher - k) for k in range(count, 0, -1)]
    return self.pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistanceTerm(PairTerm):
  """A term whose activations have the teacher's width, and are compared by a distance between vectors."""

  distance: str = option(
    "mse", choices=tuple(DISTANCES), help="'mse', relative to the teacher's norm, or 'cosine': 1 − cos."
  )

  def measure(self, student: Float[Array, "B T D"], teacher: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    """Returns each token's distance."""
    return DISTANCES[self.distance](student, teacher)


def _spans(layers_from: Sequence[int], *, depth: int) -> list[Span]:
  """Returns the teacher layers that each student layer stands for: up to where the next one begins.

  There are none where layers are not taken over in order: then no such division exists.
  """
  if not layers_from or any(b <= a for a, b in zip(layers_from, layers_from[1:], strict=False)):
    return []
  firsts, lasts = (0, *layers_from[1:]), (*(j - 1 for j in layers_from[1:]), depth - 1)
  return [Span(*span) for span in zip(layers_from, firsts, lasts, strict=True)]


def _checked(given: Any, *, term: PairTerm, setting: Setting, key: str) -> Pairs:
  if not given:
    raise InputError(
      f"{key}: a {term.kind} term needs ((student layer, teacher layer), …) unless student.layers_from names them in "
      "order"
    )
  if not isinstance(given, list | tuple):
    raise InputError(f"{key}: {given!r}; give ((student layer, teacher layer), …), 'uniform' or {{'last': k}}")
  pairs = tuple(map(tuple, given))
  depth = len(setting.student.layers)
  for pair in pairs:
    if len(pair) != 2 and not (term.spans and len(pair) == 3):
      raise InputError(f"{key}: {pair}; give (student layer, teacher layer)")
    if pair[1] > pair[-1]:
      raise InputError(f"{key}: {pair}; the teacher layer that ends the span comes before the one that begins it")
    if not (0 <= pair[0] < depth and all(0 <= layer < setting.teacher_depth for layer in pair[1:])):
      raise InputError(
        f"{key}: {pair} names a layer that is not there; the student has layers 0 to {depth - 1}, "
        f"the teacher 0 to {setting.teacher_depth - 1}"
      )
  return pairs
