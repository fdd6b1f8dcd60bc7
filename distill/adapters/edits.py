"""The kinds of edit that an adapter makes to the parameters of a model, and `apply_edit`, which makes one.

An adapter is a list of edits, each of one canonical parameter. `apply_edit` takes two versions of this parameter:
`current`, after all earlier adapters of the stack, and `trained_on`, which the adapter was trained on. For a sequential
adapter (trained on top of the earlier ones) the two are equal. For co-active adapters (trained next to each other on
one model) `trained_on` is the parameter before the first of them. Their changes add up, and the column norms that DoRA
divides by do not include the changes of the others. The adapter's weight in the stack multiplies the change of
`current`.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank:
  """Adds scale * a @ b to a matrix [I, O] (LoRA); with `magnitude`, then rescales its columns (DoRA, 2402.09353).

  Attributes:
    a: [I, R] float32; for an embedding I is the number of tokens.
    b: [R, O] float32.
    scale: alpha / R, or alpha / sqrt(R) for rsLoRA.
    magnitude: [O] the norms to which the columns of (matrix that the adapter was trained on) + scale * a @ b are
      rescaled; None without DoRA.
  """

  a: Float[np.ndarray, "I R"]
  b: Float[np.ndarray, "R O"]
  scale: float
  magnitude: Float[np.ndarray, " O"] | None = None

  @property
  def delta(self) -> Float[np.ndarray, "I O"]:
    """The change before column rescaling: scale * a @ b, [I, O]."""
    return np.float32(self.scale) * (self.a @ self.b)

  @property
  def norm(self) -> float:
    """Frobenius norm of the property `delta`, computed from a and b without forming the [I, O] matrix."""
    return float(self.scale * np.sqrt(max(0.0, np.sum((self.a.T @ self.a) * (self.b @ self.b.T)))))

  def columns(self, trained_on: Float[np.ndarray, "I O"]) -> Float[np.ndarray, " O"] | None:
    """Returns, for each column, the factor that rescales trained_on + self.delta to the norm in `magnitude`.

    Returns None without DoRA, as no column is rescaled.
    """
    if self.magnitude is None:
      return None
    lengths = np.linalg.norm(trained_on + self.delta, axis=0)
    return np.divide(self.magnitude, lengths, out=np.zeros_like(lengths), where=lengths > 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replacement:
  """Replaces a parameter; the number of tokens of an embedding or a head may change.

  Attributes:
    value: The new parameter, in the layout of canonical parameters.
    underlies: True if the adapter's other edits of this parameter were trained on top of `value`. An example is the
      resized embedding that PEFT stores as `base_layer.weight`: the LoRA factors next to it were trained on it.
  """

  value: np.ndarray
  underlies: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRows:
  """Replaces the vectors of some tokens in an embedding or in a head.

  Attributes:
    indices: Token ids.
    values: The new vector of each token, [tokens, D].
    axis: The axis of the parameter that runs over tokens: 0 in an embedding, 1 in a head.
  """

  indices: Int[np.ndarray, " tokens"]
  values: Float[np.ndarray, "tokens D"]
  axis: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Addition:
  """Adds the vector `value` to a bias; a model without this bias first gets one of zeros."""

  value: np.ndarray


Edit = LowRank | Replacement | TokenRows | Addition


def apply_edit(edit: Edit, current: np.ndarray, *, trained_on: np.ndarray, weight: float) -> np.ndarray:
  """Applies an edit to a parameter.

  Args:
    edit: The edit.
    current: The parameter after the adapters before this one.
    trained_on: The parameter that the adapter was trained on.
    weight: Scale of the change; 1 reproduces the adapter exactly.

  Returns:
    The parameter after the edit, float32.
  """
  current, trained_on = np.asarray(current, np.float32), np.asarray(trained_on, np.float32)
  match edit:
    case Addition():
      return current + np.float32(weight) * edit.value
    case LowRank():
      factors = edit.columns(trained_on)
      if factors is None:
        return current + np.float32(weight) * edit.delta
      return _towards(current, factors * (current + edit.delta), weight)
    case Replacement():
      return _replaced(edit.value, current, trained_on, weight)
    case TokenRows():
      after, rows, originals = (np.moveaxis(x, edit.axis, 0) for x in (current.copy(), current, trained_on))
      after[edit.indices] = _replaced(edit.values, rows[edit.indices], originals[edit.indices], weight)
      return np.moveaxis(after, 0, edit.axis)
  raise AssertionError(edit)


def _towards(start: np.ndarray, end: np.ndarray, weight: float) -> np.ndarray:
  return end if weight == 1 else start + np.float32(weight) * (end - start)


def _replaced(value: np.ndarray, current: np.ndarray, trained_on: np.ndarray, weight: float) -> np.ndarray:
  """Returns `current` plus `weight` times the change from `trained_on` to `value`.

  If `value` has more tokens than `current`, the vectors of the new tokens are those of `value`.
  """
  if value.shape != current.shape:
    axis = next(i for i, (one, other) in enumerate(zip(value.shape, current.shape, strict=True)) if one != other)
    shared = min(value.shape[axis], current.shape[axis])
    known = [np.take(x, range(shared), axis=axis) for x in (value, current, trained_on)]
    new = np.take(value, range(shared, value.shape[axis]), axis=axis)
    return np.concatenate([_replaced(known[0], known[1], known[2], weight), new], axis=axis)
  end = value if np.array_equal(current, trained_on) else current + (value - trained_on)
  return _towards(current, end, weight)
