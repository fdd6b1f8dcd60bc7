import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distill.data.packing import loss_mask, pack, positions


@st.composite
def documents(draw):
  """Draws (documents of different tokens, some of which count in the loss, and a row length)."""
  sizes = draw(st.lists(st.integers(1, 23), min_size=1, max_size=20))
  starts = np.cumsum([1, *sizes])
  in_loss = [np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size))) for size in sizes]
  tokens = [np.arange(start, start + size, dtype=np.int32) for size, start in zip(sizes, starts[:-1], strict=True)]
  return list(zip(tokens, in_loss, strict=True)), draw(st.integers(2, 9))


def packed(given_documents, length):
  rows = list(pack(iter(given_documents), length=length))
  return tuple(np.stack(part) for part in zip(*rows, strict=True))


@given(documents())
def test_packing_loses_no_token_and_cuts_only_documents_longer_than_a_row(drawn):
  given_documents, length = drawn
  tokens, segments, in_loss = packed(given_documents, length)
  pieces = []
  for row, number, counts in zip(tokens, segments, in_loss, strict=True):
    used = number.max()
    assert sorted(set(number) - {0}) == list(range(1, used + 1))
    assert (np.diff(np.where(number == 0, used + 1, number)) >= 0).all()
    pieces += [(row[number == one].tolist(), counts[number == one].tolist()) for one in range(1, used + 1)]
  wanted = [
    (one[at : at + length].tolist(), counts[at : at + length].tolist())
    for one, counts in given_documents
    for at in range(0, len(one), length)
  ]
  assert sorted(pieces) == sorted(wanted)
  assert not tokens[segments == 0].any() and not in_loss[segments == 0].any()


def test_packing_fills_the_room_after_long_documents_with_short_ones():
  sizes = [70, 90, 30, 60, 10, 40]
  _, segments, _ = packed([(np.ones(size, np.int32), np.ones(size, bool)) for size in sizes], 100)
  assert len(segments) == 3 and (segments > 0).all()


@given(documents())
def test_positions_and_loss_mask_of_packed_rows_equal_their_definitions(drawn):
  given_documents, length = drawn
  tokens, segments, in_loss = packed(given_documents, length)
  where, mask = positions(segments), loss_mask(segments, in_loss=in_loss)
  for row in range(len(tokens)):
    for at in range(length):
      number = segments[row, at]
      first = segments[row].tolist().index(number)
      assert where[row, at] == (at - first if number else 0)
      follows = at + 1 < length and number > 0 and segments[row, at + 1] == number
      assert mask[row, at] == float(follows and in_loss[row, at + 1])
