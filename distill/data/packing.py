"""Packing of documents into rows of a fixed length."""

from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32

Tokenised = tuple[Int32[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]
Row = tuple[Int32[np.ndarray, " T"], Int32[np.ndarray, " T"], Bool[np.ndarray, " T"]]

_OPEN_ROWS = 32


def pack(documents: Iterable[Tokenised], *, length: int) -> Iterator[Row]:
  """Packs documents into rows by best fit.

  No token is lost. A document goes into the fullest unfinished row that has room for it, or else into a new row. One
  that is longer than a row is cut into pieces of `length`, each a segment of its own. The rows depend only on the
  documents and their order.

  Args:
    documents: (tokens, in_loss) of each document; in_loss[t] is True if predicting tokens[t] counts in the loss.
    length: Number of tokens T in a row.

  Yields:
    (tokens, segments, in_loss) of each row, arrays [T]. Segments number the row's documents from 1; padding has 0.
  """
  rows: list[_OpenRow] = []
  for tokens, in_loss in documents:
    for start in range(0, len(tokens), length):
      piece = tokens[start : start + length], in_loss[start : start + length]
      fitting = [row for row in rows if row.room >= len(piece[0])]
      row = min(fitting, key=lambda row: row.room) if fitting else _OpenRow(length)
      row.add(*piece)
      if not fitting:
        rows.append(row)
      if not row.room or len(rows) > _OPEN_ROWS:
        full = min(rows, key=lambda row: row.room)
        rows.remove(full)
        yield full.arrays
  for row in rows:
    yield row.arrays


class _OpenRow:
  """A row that is being filled; `room` is the number of tokens that still fit."""

  def __init__(self, length: int):
    self.arrays: Row = (np.zeros(length, np.int32), np.zeros(length, np.int32), np.zeros(length, bool))
    self.room, self._documents = length, 0

  def add(self, tokens: Int32[np.ndarray, " tokens"], in_loss: Bool[np.ndarray, " tokens"]) -> None:
    """Appends a document, or a piece of one, as a new segment; `in_loss` is True for tokens that count in the loss."""
    start = len(self.arrays[0]) - self.room
    place = slice(start, start + len(tokens))
    self._documents += 1
    for array, part in zip(self.arrays, (tokens, self._documents, in_loss), strict=True):
      array[place] = part
    self.room -= len(tokens)


def positions(segments: Int[np.ndarray, "rows T"]) -> Int32[np.ndarray, "rows T"]:
  """Returns the position of each token within its document, [rows,T], from 0; 0 in padding."""
  index = np.arange(segments.shape[1], dtype=np.int32)
  starts = np.zeros_like(segments)
  starts[:, 1:] = np.where(segments[:, 1:] != segments[:, :-1], index[1:], 0)
  return np.where(segments > 0, index - np.maximum.accumulate(starts, axis=1), 0).astype(np.int32)


def loss_mask(
  segments: Int[np.ndarray, "rows T"], *, in_loss: Bool[np.ndarray, "rows T"]
) -> Float32[np.ndarray, "rows T"]:
  """Returns the mask [rows,T]: 1.0 where the NEXT token is of the same document and counts in the loss, else 0.0."""
  mask = np.zeros(segments.shape, np.float32)
  same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
  mask[:, :-1] = same & in_loss[:, 1:]
  return mask
