"""Documents become rows of a fixed length."""

from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32

Tokenised = tuple[Int32[np.ndarray, " N"], Bool[np.ndarray, " N"]]
Row = tuple[Int32[np.ndarray, " T"], Int32[np.ndarray, " T"], Bool[np.ndarray, " T"]]

_OPEN_ROWS = 32


def pack(documents: Iterable[Tokenised], *, length: int) -> Iterator[Row]:
  """Rows filled by best fit: none of a document is lost, and only one longer than a row is cut.

  A document goes into the fullest of the open rows that has room for it, and starts a row where none has; a longer one
  is cut into pieces of `length`, each a segment of its own. Which row a document is in depends on nothing but the order
  of the documents.

  Args:
    documents: (tokens, learnt) of each; learnt[t] says whether predicting tokens[t] counts.
    length: Tokens a row, T.

  Yields:
    (tokens, segments, learnt) [T]: segments count from 1 and are 0 in padding.
  """
  rows: list[_Filling] = []
  for tokens, learnt in documents:
    for start in range(0, len(tokens), length):
      piece = tokens[start : start + length], learnt[start : start + length]
      fitting = [row for row in rows if row.room >= len(piece[0])]
      row = min(fitting, key=lambda row: row.room) if fitting else _Filling(length)
      row.add(*piece)
      if not fitting:
        rows.append(row)
      if not row.room or len(rows) > _OPEN_ROWS:
        full = min(rows, key=lambda row: row.room)
        rows.remove(full)
        yield full.arrays
  for row in rows:
    yield row.arrays


class _Filling:
  """A row with `room` for more tokens."""

  def __init__(self, length: int):
    self.arrays: Row = (np.zeros(length, np.int32), np.zeros(length, np.int32), np.zeros(length, bool))
    self.room, self._documents = length, 0

  def add(self, tokens: Int32[np.ndarray, " N"], learnt: Bool[np.ndarray, " N"]) -> None:
    """Puts a document, or a piece of one, behind those that are there."""
    start = len(self.arrays[0]) - self.room
    place = slice(start, start + len(tokens))
    self._documents += 1
    for array, part in zip(self.arrays, (tokens, self._documents, learnt), strict=True):
      array[place] = part
    self.room -= len(tokens)


def positions(segments: Int[np.ndarray, "N T"]) -> Int32[np.ndarray, "N T"]:
  """Position of each token [N,T] within its document, from 0; 0 in padding."""
  index = np.arange(segments.shape[1], dtype=np.int32)
  starts = np.zeros_like(segments)
  starts[:, 1:] = np.where(segments[:, 1:] != segments[:, :-1], index[1:], 0)
  return np.where(segments > 0, index - np.maximum.accumulate(starts, axis=1), 0).astype(np.int32)


def loss_mask(segments: Int[np.ndarray, "N T"], *, learnt: Bool[np.ndarray, "N T"]) -> Float32[np.ndarray, "N T"]:
  """1.0 where the next token [N,T] belongs to the same document and is learnt."""
  mask = np.zeros(segments.shape, np.float32)
  same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
  mask[:, :-1] = same & learnt[:, 1:]
  return mask
