"""What an adapter does to a model: edits of canonical parameters, from which merging, live use and inspection follow.

An edit changes `current`, the parameter as the adapters before it left it, by something measured on `base`, the
parameter that its adapter was made for. In a sequential stack both are the same. Under co-active adapters `base` is
what it was before the first of them, so that their changes add up, and DoRA divides by a norm that the others have no
part in. A weight other than 1 goes that share of the way from `current` to what the edit says.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank:
  """scale * a @ b is added, then columns are set to the length `magnitude`, if there is one (DoRA, 2402.09353).

  Attributes:
    a: [in, r], float32; in counts tokens in an embedding.
    b: [r, out], float32.
    scale: alpha / r, or alpha / sqrt(r).
    magnitude: [out], the length of every column before the weight's own, by `‖base + scale * a @ b‖`.
  """

  a: Float[np.ndarray, "I R"]
  b: Float[np.ndarray, "R O"]
  scale: float
  magnitude: Float[np.ndarray, " O"] | None = None

  @property
  def delta(self) -> Float[np.ndarray, "I O"]:
    """scale * a @ b."""
    return np.float32(self.scale) * (self.a @ self.b)

  @property
  def norm(self) -> float:
    """Frobenius norm of `delta`, without forming it."""
    return float(self.scale * np.sqrt(max(0.0, np.sum((self.a.T @ self.a) * (self.b @ self.b.T)))))

  def columns(self, base: Float[np.ndarray, "I O"]) -> Float[np.ndarray, " O"] | None:
    """Factor of each column (DoRA), or None."""
    if self.magnitude is None:
      return None
    lengths = np.linalg.norm(base + self.delta, axis=0)
    return np.divide(self.magnitude, lengths, out=np.zeros_like(lengths), where=lengths > 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replacement:
  """The whole tensor takes the parameter's place; an embedding or a head may come with another number of tokens.

  Attributes:
    value: In our layout.
    underlies: It is the tensor that the adapter's other edits of this parameter start from.
  """

  value: np.ndarray
  underlies: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRows:
  """Some tokens of an embedding (axis 0) or of a head (axis 1) are replaced.

  Attributes:
    indices: Token ids.
    values: [tokens, D].
    axis: The parameter's axis of tokens.
  """

  indices: Int[np.ndarray, " N"]
  values: Float[np.ndarray, "N D"]
  axis: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Addition:
  """A vector that is added to a bias, which is zero where the model had none."""

  value: np.ndarray


Edit = LowRank | Replacement | TokenRows | Addition


def apply(edit: Edit, current: np.ndarray, *, base: np.ndarray, weight: float) -> np.ndarray:
  """`current` after the edit, in float32; `weight` scales the change, and 1 gives what the adapter says, exactly."""
  current, base = np.asarray(current, np.float32), np.asarray(base, np.float32)
  match edit:
    case Addition():
      return current + np.float32(weight) * edit.value
    case LowRank():
      factors = edit.columns(base)
      if factors is None:
        return current + np.float32(weight) * edit.delta
      return _towards(current, factors * (current + edit.delta), weight)
    case Replacement():
      return _replaced(edit.value, current, base, weight)
    case TokenRows():
      after, rows, originals = (np.moveaxis(x, edit.axis, 0) for x in (current.copy(), current, base))
      after[edit.indices] = _replaced(edit.values, rows[edit.indices], originals[edit.indices], weight)
      return np.moveaxis(after, 0, edit.axis)
  raise AssertionError(edit)


def _towards(start: np.ndarray, end: np.ndarray, weight: float) -> np.ndarray:
  return end if weight == 1 else start + np.float32(weight) * (end - start)


def _replaced(value: np.ndarray, current: np.ndarray, base: np.ndarray, weight: float) -> np.ndarray:
  """The change from `base` to `value`, on `current`; tokens that only `value` has come as they are."""
  if value.shape != current.shape:
    axis = next(i for i, (one, other) in enumerate(zip(value.shape, current.shape, strict=True)) if one != other)
    kept = min(value.shape[axis], current.shape[axis])
    known = [np.take(x, range(kept), axis=axis) for x in (value, current, base)]
    new = np.take(value, range(kept, value.shape[axis]), axis=axis)
    return np.concatenate([_replaced(known[0], known[1], known[2], weight), new], axis=axis)
  end = value if np.array_equal(current, base) else current + (value - base)
  return _towards(current, end, weight)
