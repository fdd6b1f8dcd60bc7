"""What a smaller student keeps of its teacher, chosen by importance, and parameters cut to it."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

Array = np.ndarray

# The axis of a parameter that runs over the channels of the residual stream; the first rule that fits.
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


def most_important(scores: Float[Array, " N"], count: int) -> Int[Array, " M"]:
  """Places of the `count` highest scores, in their order; of equals the first."""
  return np.sort(np.argsort(-scores, kind="stable")[:count])


@dataclasses.dataclass(frozen=True)
class Heads:
  """Where the heads of a mixer come from.

  Attributes:
    queries: The teacher's head behind each head of the student; neighbours share a key head.
    keys: The teacher's key/value heads behind each of the student's; of several the mean is taken.
  """

  queries: tuple[int, ...]
  keys: tuple[tuple[int, ...], ...]


def choose_heads(scores: Float[Array, " N"], *, keys: int, kept: int, kept_keys: int) -> Heads | None:
  """The heads that matter most, each with the key head it was trained with.

  Where the student's groups of query heads are no larger than the teacher's, a group keeps its best query heads, and a
  teacher's key head serves several groups only if the student has more key heads than the teacher. Larger groups take
  whole groups of the teacher together, under the mean of their key heads (Ainslie et al. 2023, 2305.13245).

  Args:
    scores: Importance of the teacher's query heads.
    keys: Number of its key heads.
    kept: Number of the student's query heads.
    kept_keys: Number of its key heads.

  Returns:
    None if the teacher has too few heads, or the groups do not divide.
  """
  group, size = len(scores) // keys, kept // kept_keys
  by_key = scores.reshape(keys, group)
  if size > group:
    together = size // group
    if size % group or kept_keys * together > keys:
      return None
    chosen = most_important(by_key.sum(axis=1), kept_keys * together).reshape(kept_keys, together)
    heads = tuple(int(key) * group + i for key in chosen.reshape(-1) for i in range(group))
    return Heads(heads, tuple(tuple(map(int, keys)) for keys in chosen))
  ranked = np.argsort(-by_key, axis=1, kind="stable")
  rounds = 1 if kept_keys <= keys else group // size
  if kept_keys > keys * rounds:
    return None
  sums = np.take_along_axis(by_key, ranked, axis=1)[:, : rounds * size].reshape(keys, rounds, size).sum(axis=2)
  parts = np.bincount(most_important(sums.reshape(-1), kept_keys) // rounds, minlength=keys)
  queries, served = [], []
  for key, count in enumerate(parts):
    queries += [key * group + int(i) for i in np.sort(ranked[key, : count * size])]
    served += [(key,)] * int(count)
  return Heads(tuple(queries), tuple(served))


def pick(value: Array, kept: Sequence[int | tuple[int, ...]], *, axis: int, units: int) -> Array:
  """`value` with one of its axes, which holds `units` parts of one size, reduced to those in `kept`.

  Args:
    value: Any parameter.
    kept: A part, or several whose mean is taken, for every part of the result.
    axis: The axis.
    units: Number of parts.
  """
  parts = np.moveaxis(value, axis, 0).reshape(units, value.shape[axis] // units, *np.delete(value.shape, axis))
  chosen = np.stack([parts[one] if isinstance(one, int) else parts[list(one)].mean(axis=0) for one in kept])
  return np.moveaxis(chosen.reshape(-1, *parts.shape[2:]), 0, axis)


def cut_channels(name: str, value: Array, channels: Int[Array, " D"] | None) -> Array:
  """A parameter for a residual stream of the given channels alone; None for all of them."""
  axis = next((axis for pattern, axis in _CHANNEL_AXES if re.fullmatch(pattern, name)), None)
  return value if channels is None or axis is None else np.take(value, channels, axis=axis)


def norm_correction(share: Float[Array, " F"], kept: Sequence[int] | Int[Array, " M"]) -> float:
  """What a norm's scale is multiplied by when it sees `kept` of its inputs alone.

  A norm divides by the root of the mean over its inputs: fewer of them have another mean. The factor is the root of
  (mean square of those kept / mean square of all), as measured; where the others are zero the norm's output is the
  teacher's, but for its epsilon.
  """
  return float(np.sqrt(np.sum(share[np.asarray(kept)]) * len(share) / len(kept)))
