"""Chooses the parts of a teacher that a smaller student retains, and cuts parameters to them."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

Array = np.ndarray

# The axis of a parameter that runs over the channels of the residual stream; the first rule that matches decides.
_CHANNEL_AXES: tuple[tuple[str, int | None], ...] = (
  (r"(embed|positions)\.table", 1),
  (r"head\.kernel", 0),
  (r"(layers\.\d+\.)?\w*norm\.(scale|bias)", 0),
  (r".*\.conv\..*", None),
  (r".*\.experts\.(gate|up)\.kernel", 1),
  (r".*\.experts\.down\.kernel", 2),
  (r".*\.experts\.down\.bias", 1),
  (r".*\.(o|down)\.kernel", 1),
  (r".*\.(o|down)\.bias", 0),
  (r".*\.kernel", 0),
)


def most_important(scores: Float[Array, " parts"], count: int) -> Int[Array, " count"]:
  """Returns the indices of the `count` highest scores, ascending; ties go to the lower index."""
  return np.sort(np.argsort(-scores, kind="stable")[:count])


@dataclasses.dataclass(frozen=True)
class Heads:
  """The teacher's heads that the heads of a student's mixer start from.

  Attributes:
    queries: For each student query head, the index of its teacher query head. Heads that share a key head are adjacent.
    keys: For each student key/value head, the indices of the teacher key/value heads whose mean it starts from.
  """

  queries: tuple[int, ...]
  keys: tuple[tuple[int, ...], ...]


def choose_heads(scores: Float[Array, " N"], *, keys: int, retained: int, retained_keys: int) -> Heads | None:
  """Returns the teacher's most important query heads, each with the key head it was trained with.

  A group is the query heads that share one key head. If the student's groups are no larger than the teacher's, each
  holds the most important query heads of one teacher group; several start from the same teacher group only if the
  student has more key heads than the teacher. If the student's groups are larger, each merges whole teacher groups,
  whose key heads are averaged (Ainslie et al. 2023, 2305.13245).

  Args:
    scores: Importance of the teacher's query heads.
    keys: Number of the teacher's key heads.
    retained: Number of the student's query heads.
    retained_keys: Number of the student's key heads.

  Returns:
    The chosen heads; None if the teacher has too few, or the size of the student's groups is above the teacher's but
    not a multiple of it.
  """
  group, size = len(scores) // keys, retained // retained_keys
  by_key = scores.reshape(keys, group)
  if size > group:
    merged = size // group
    if size % group or retained_keys * merged > keys:
      return None
    chosen = most_important(by_key.sum(axis=1), retained_keys * merged).reshape(retained_keys, merged)
    heads = tuple(int(key) * group + i for key in chosen.reshape(-1) for i in range(group))
    return Heads(heads, tuple(tuple(map(int, keys)) for keys in chosen))
  ranked = np.argsort(-by_key, axis=1, kind="stable")
  # With more key heads than the teacher has, each of the teacher's groups is split into parts of the student's size.
  parts = 1 if retained_keys <= keys else group // size
  if retained_keys > keys * parts:
    return None
  sums = np.take_along_axis(by_key, ranked, axis=1)[:, : parts * size].reshape(keys, parts, size).sum(axis=2)
  counts = np.bincount(most_important(sums.reshape(-1), retained_keys) // parts, minlength=keys)
  queries, served = [], []
  for key, count in enumerate(counts):
    queries += [key * group + int(i) for i in np.sort(ranked[key, : count * size])]
    served += [(key,)] * int(count)
  return Heads(tuple(queries), tuple(served))


def pick(value: Array, retained: Sequence[int | tuple[int, ...]], *, axis: int, units: int) -> Array:
  """Returns `value` with one axis reduced to chosen units; a unit, such as a head, is one of `units` equal slices.

  Args:
    value: Any parameter.
    retained: For each unit of the result, the index of a unit of `value`, or a tuple of several whose mean is taken.
    axis: The axis that holds the units, such as heads or neurons.
    units: Number of units in `value`.
  """
  parts = np.moveaxis(value, axis, 0).reshape(units, value.shape[axis] // units, *np.delete(value.shape, axis))
  chosen = np.stack([parts[one] if isinstance(one, int) else parts[list(one)].mean(axis=0) for one in retained])
  return np.moveaxis(chosen.reshape(-1, *parts.shape[2:]), 0, axis)


def cut_channels(name: str, value: Array, channels: Int[Array, " D"] | None) -> Array:
  """Returns a parameter cut to the channels of a narrower residual stream.

  Args:
    name: Canonical name, which decides the axis that runs over the channels.
    value: The parameter.
    channels: Indices of the retained channels; None for all of them.
  """
  axis = next((axis for pattern, axis in _CHANNEL_AXES if re.fullmatch(pattern, name)), None)
  return value if channels is None or axis is None else np.take(value, channels, axis=axis)


def norm_correction(share: Float[Array, " F"], retained: Sequence[int] | Int[Array, " retained"]) -> float:
  """Returns the factor for a norm's scale that compensates for removed inputs.

  A norm divides by the root mean square (RMS) of its inputs, and removing inputs changes the RMS. The factor is the
  root of (mean square of the retained inputs / mean square of all inputs), as measured. If the removed inputs are zero,
  the norm's output equals the teacher's except for epsilon.

  Args:
    share: Share of each input in the mean square, as in `Importance.shares`.
    retained: Indices of the inputs that the student retains.
  """
  return float(np.sqrt(np.sum(share[np.asarray(retained)]) * len(share) / len(retained)))
