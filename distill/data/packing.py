"""Documents become rows of a fixed length."""

from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32

Tokenised = tuple[Int32[np.ndarray, " N"], Bool[np.ndarray, " N"]]
Row = tuple[Int32[np.ndarray, " T"], Int32[np.ndarray, " T"], Bool[np.ndarray, " T"]]


def pack(documents: Iterable[Tokenised], *, length: int) -> Iterator[Row]:
  """Rows filled document by document; none is lost, and only one longer than a row is cut.

  A document that does not fit into what is left of a row starts the next row when it fits into one; a longer one is
  cut into pieces of `length`, each a segment of its own.

  Args:
    documents: (tokens, learnt) of each; learnt[t] says whether predicting tokens[t] counts.
    length: Tokens a row, T.

  Yields:
    (tokens, segments, learnt) [T]: segments count from 1 and are 0 in padding.
  """
  row = _empty(length)
  used = number = 0
  for tokens, learnt in documents:
    for start in range(0, len(tokens), length):
      piece = slice(start, start + length)
      size = len(tokens[piece])
      if used + size > length:
        yield row
        row, used, number = _empty(length), 0, 0
      number += 1
      place = slice(used, used + size)
      row[0][place], row[1][place], row[2][place] = tokens[piece], number, learnt[piece]
      used += size
  if used:
    yield row


def _empty(length: int) -> Row:
  return np.zeros(length, np.int32), np.zeros(length, np.int32), np.zeros(length, bool)


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
