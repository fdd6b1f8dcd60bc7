"""Base classes of loss terms that compare layers of the student with layers of the teacher, pair by pair."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import jax.numpy as jnp
from jaxtyping import Array, Float

from distill.configuration import option
from distill.errors import InputError
from distill.losses.layer_distances import cosine, relative_mse
from distill.objectives.term import LossContext, LossInputs, Scalar, Setting, Term, TermState

DISTANCES: Mapping[str, Callable[..., Float[Array, "B T"]]] = {"mse": relative_mse, "cosine": cosine}

Pairs = tuple[tuple[int, ...], ...]


class Span(NamedTuple):
  """Indices of the neighbouring teacher layers that one student layer replaces.

  Attributes:
    source: The teacher layer that the student layer is initialised from; `first` if `pairs` is 'uniform'.
    first: The first replaced layer.
    last: The last replaced layer.
  """

  source: int
  first: int
  last: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairTerm(Term):
  """Base class of terms that compare activations of student layers with those of teacher layers, pair by pair.

  The loss is a distance between the two activations, averaged over layer pairs and non-padding tokens.

  If `balanced` is set, the term's state holds a ratio that multiplies its weight. The term then counts as much as the
  reference terms of the stage (`Term.reference`), such as divergences.
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
    """Returns the term with its (student layer, teacher layer) pairs listed; unchanged while they cannot be known.

    They cannot be known if they follow `layers_from` and the layers are not chosen yet.

    Raises:
      InputError: There are no pairs, one is malformed or names a layer that does not exist, or `balanced` is set but
        the stage has no reference term (`Term.reference`). The message begins with `key`, the term's place in the
        recipe.
    """
    if self.balanced and not setting.has_reference:
      raise InputError(
        f"{key}.balanced: the stage has no divergence or cross-entropy to scale this term to; add one, or leave out "
        "balanced"
      )
    pairs = self._spread(setting)
    if not pairs and setting.layers_from is None:
      return self
    return dataclasses.replace(self, pairs=_checked(pairs, term=self, setting=setting, key=f"{key}.pairs"))

  def pair(self, student: int, span: Span) -> tuple[int, ...]:
    """Returns the default pair of a student layer, which counts unless the option `pairs` lists the pairs itself.

    Args:
      student: Index of the student layer.
      span: The teacher layers that it replaces.

    Returns:
      (student layer, teacher layer) or, if `spans` is set, (student layer, first teacher layer, last teacher layer).
    """
    raise NotImplementedError

  def distances(self, inputs: LossInputs) -> Iterator[Float[Array, "B T"]]:
    """Yields the distance at every token, once for each layer pair; no gradient flows into the teacher."""
    raise NotImplementedError

  @property
  def listed(self) -> Pairs:
    """The layer pairs, as tuples of layer indices; only a term that the method `bind` returned has them."""
    assert isinstance(self.pairs, tuple), "the pairs are listed by bind; call it first"
    return cast(Pairs, self.pairs)

  def loss(self, inputs: LossInputs, context: LossContext) -> Scalar:
    """Returns the part of the mean distance that comes from this micro-batch's tokens.

    The mean is over layer pairs and over the non-padding tokens of the global batch, so the parts add up to it.
    """
    present = (inputs.batch.segments > 0).astype(jnp.float32)
    total = jnp.zeros((), jnp.float32)
    for distance in self.distances(inputs):
      total = total + jnp.sum(present * distance)
    return total / len(self.listed) / context.totals["present"]

  def initial_state(self) -> TermState:
    """Returns {'ratio': 1} if `balanced` is set, else {}; the ratio is a factor of the term's weight."""
    return {"ratio": jnp.float32(1.0)} if self.balanced else {}

  def next_state(self, state: TermState, *, value: Scalar, reference: Scalar, context: LossContext) -> TermState:
    """Returns the state with the ratio reference / value, a factor of the next step's weight if `balanced` is set.

    If this ratio is not finite, the state keeps the ratio of the step before.

    Args: as `Term.next_state`.
    """
    ratio = reference / value
    return {"ratio": jnp.where(jnp.isfinite(ratio), ratio, state["ratio"])}

  def factor(self, state: TermState) -> float | Scalar:
    """Returns the factor of the term's weight: the state's 'ratio' if the option `balanced` is set, else 1."""
    return state["ratio"] if self.balanced else 1.0

  def _spread(self, setting: Setting) -> Any:
    """Returns the layer pairs that the option `pairs` stands for, not checked yet.

    A rule such as 'uniform' is expanded, and explicit pairs are returned as they are. If the option is empty, every
    student layer gets its default pair (the method `pair`). There are no default pairs if `setting.layers_from` is
    None or not in ascending order.
    """
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
  """Base class of pair terms that compare vectors of the teacher's width; the option `distance` names the distance."""

  distance: str = option(
    "mse", choices=tuple(DISTANCES), help="'mse', relative to the teacher's norm, or 'cosine': 1 − cos."
  )

  def measure(self, student: Float[Array, "B T D"], teacher: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    """Returns each token's distance between the student's and the teacher's vectors."""
    return DISTANCES[self.distance](student, teacher)


def _spans(layers_from: Sequence[int], *, depth: int) -> list[Span]:
  """Divides the teacher's layers among the student's; returns the span of each student layer.

  The first span starts at layer 0. Every other span starts at the teacher layer that its student layer is initialised
  from, and the span before it ends one layer earlier. The last span ends with the teacher's last layer.

  Args:
    layers_from: For each student layer, the index of the teacher layer that it is initialised from.
    depth: Number of the teacher's layers.

  Returns:
    One span for each student layer; an empty list if `layers_from` is empty or not in ascending order.
  """
  if not layers_from or any(b <= a for a, b in zip(layers_from, layers_from[1:], strict=False)):
    return []
  firsts, lasts = (0, *layers_from[1:]), (*(j - 1 for j in layers_from[1:]), depth - 1)
  return [Span(*span) for span in zip(layers_from, firsts, lasts, strict=True)]


def _checked(given: Any, *, term: PairTerm, setting: Setting, key: str) -> Pairs:
  if not given:
    raise InputError(
      f"{key}: no layer pairs for a {term.kind} term; give ((student layer, teacher layer), …), or list "
      "student.layers_from in ascending order"
    )
  if not isinstance(given, list | tuple):
    raise InputError(f"{key}: got {given!r}; give ((student layer, teacher layer), …), 'uniform' or {{'last': k}}")
  pairs = tuple(map(tuple, given))
  depth = len(setting.student.layers)
  for pair in pairs:
    if len(pair) != 2 and not (term.spans and len(pair) == 3):
      raise InputError(f"{key}: {pair} is not a layer pair; give (student layer, teacher layer)")
    if pair[1] > pair[-1]:
      raise InputError(f"{key}: the last teacher layer of {pair} comes before the first; swap them")
    if not (0 <= pair[0] < depth and all(0 <= layer < setting.teacher_depth for layer in pair[1:])):
      raise InputError(
        f"{key}: {pair} names a layer that does not exist; choose from the student's layers 0 to {depth - 1} and the "
        f"teacher's 0 to {setting.teacher_depth - 1}"
      )
  return pairs
