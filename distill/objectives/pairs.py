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
  """Indices of teacher layers: a student layer replaces `first` to `last`, and is initialised from `source`."""

  source: int
  first: int
  last: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairTerm(Term):
  """Base class of terms that average a distance between paired layers' activations over pairs and non-padding tokens.

  If `balanced` is set, the state holds a ratio that scales the weight so that the term counts as much as the
  reference terms.
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
    """Returns the term with its pairs listed; the list is empty if it depends on a layers_from not known yet."""
    if self.balanced and not setting.has_reference:
      raise InputError(
        f"{key}.balanced: the stage has no term of logits to balance it with; add one, or leave balanced out"
      )
    pairs = self._spread(setting)
    if not pairs and setting.layers_from is None:
      return self
    return dataclasses.replace(self, pairs=_checked(pairs, term=self, setting=setting, key=f"{key}.pairs"))

  def pair(self, student: int, span: Span) -> tuple[int, ...]:
    """Returns the default pair of a student layer, from the teacher layers that it replaces."""
    raise NotImplementedError

  def distances(self, inputs: LossInputs) -> Iterator[Float[Array, "B T"]]:
    """Yields each token's distance for every pair, in order; no gradient flows into the teacher's side."""
    raise NotImplementedError

  @property
  def listed(self) -> Pairs:
    """Returns the layer pairs of a bound term, as `bind` listed them."""
    assert isinstance(self.pairs, tuple), "bind comes first"
    return cast(Pairs, self.pairs)

  def loss(self, inputs: LossInputs, context: LossContext) -> Scalar:
    """Returns the micro-batch's share of the mean distance over pairs and non-padding tokens."""
    present = (inputs.batch.segments > 0).astype(jnp.float32)
    total = jnp.zeros((), jnp.float32)
    for distance in self.distances(inputs):
      total = total + jnp.sum(present * distance)
    return total / len(self.listed) / context.totals["present"]

  def initial_state(self) -> TermState:
    """Returns a ratio of one if `balanced` is set, else an empty state."""
    return {"ratio": jnp.float32(1.0)} if self.balanced else {}

  def next_state(self, state: TermState, *, value: Scalar, reference: Scalar, context: LossContext) -> TermState:
    """Returns the ratio at which this step's term would have equalled the stage's reference terms."""
    ratio = reference / value
    return {"ratio": jnp.where(jnp.isfinite(ratio), ratio, state["ratio"])}

  def factor(self, state: TermState) -> float | Scalar:
    """Returns the factor of the term's weight: the ratio in the state if `balanced` is set, else 1."""
    return state["ratio"] if self.balanced else 1.0

  def _spread(self, setting: Setting) -> Any:
    """Returns the pairs that a rule such as 'uniform' stands for; explicit pairs are returned unchanged."""
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
  """Base class of pair terms that compare vectors of the teacher's width by the distance of the `distance` option."""

  distance: str = option(
    "mse", choices=tuple(DISTANCES), help="'mse', relative to the teacher's norm, or 'cosine': 1 − cos."
  )

  def measure(self, student: Float[Array, "B T D"], teacher: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    """Returns each token's distance between the student's and the teacher's vectors."""
    return DISTANCES[self.distance](student, teacher)


def _spans(layers_from: Sequence[int], *, depth: int) -> list[Span]:
  """Returns the teacher layers that each student layer replaces: all before the next student layer's source.

  Returns an empty list if `layers_from` is not in ascending order, since no such division exists then.
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
      raise InputError(f"{key}: {pair}; the last teacher layer comes before the first; swap them")
    if not (0 <= pair[0] < depth and all(0 <= layer < setting.teacher_depth for layer in pair[1:])):
      raise InputError(
        f"{key}: {pair} names a layer that does not exist; the student has layers 0 to {depth - 1}, "
        f"the teacher 0 to {setting.teacher_depth - 1}"
      )
  return pairs
