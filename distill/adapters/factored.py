"""Composes all low-rank edits that adapters make to one matrix into one change: base becomes column * base + a @ b."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from distill.adapters.edits import LowRank
from distill.adapters.stack import StackedAdapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factored:
  """A change of one matrix, or of some of its columns: the matrix `base` becomes column * base + a @ b.

  Attributes:
    a: [I, R] first factors of all low-rank edits, concatenated along the rank.
    b: [R, O] second factors, with the scales and weights of the edits.
    column: [O] factor of each column of the base; 1 unless an adapter uses DoRA.
  """

  a: Float[np.ndarray, "I R"]
  b: Float[np.ndarray, "R O"]
  column: Float[np.ndarray, " O"]

  def of(self, base: Float[np.ndarray, "I O"], *, rows: slice = slice(None)) -> Float[np.ndarray, "I O"]:
    """Returns the changed matrix; if `rows` is given, `base` and the result hold only these rows of the matrix."""
    return self.column * base + self.a[rows] @ self.b


def factored(
  name: str,
  *,
  adapters: Sequence[StackedAdapter],
  shape: tuple[int, ...],
  base: Callable[[], Float[np.ndarray, "I O"]],
  columns: slice = slice(None),
) -> Factored:
  """Composes all low-rank edits of one parameter into one change, with the order, weights and modes of the stack.

  Args:
    name: Canonical name of the parameter.
    adapters: The adapters, in the order of the stack.
    shape: Shape of the parameter, (I, O).
    base: Function that returns the parameter in the base, only the columns `columns`, float32. It is called only for
      DoRA, which needs the norms of these columns.
    columns: The columns of the parameter that the change covers; by default all.
  """
  count = len(range(shape[1])[columns])
  now = Factored(
    a=np.zeros((shape[0], 0), np.float32), b=np.zeros((0, count), np.float32), column=np.ones(count, np.float32)
  )
  start = now
  for entry, adapter in adapters:
    if entry.mode == "sequential":
      start = now
    for edit in (edit for one, edit in adapter.edits if one == name):
      assert isinstance(edit, LowRank), edit
      share, b = np.float32(entry.weight), np.float32(edit.scale) * edit.b[:, columns]
      if edit.magnitude is None:
        now = dataclasses.replace(now, a=np.concatenate([now.a, edit.a], axis=1), b=np.concatenate([now.b, share * b]))
        continue
      cut = dataclasses.replace(edit, b=edit.b[:, columns], magnitude=edit.magnitude[columns])
      factor = cut.columns(start.of(base()))
      assert factor is not None
      keep = 1 + share * (factor - 1)
      now = Factored(
        a=np.concatenate([now.a, edit.a], axis=1),
        b=np.concatenate([now.b * keep, share * factor * b]),
        column=now.column * keep,
      )
  return now
