import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.data.batches import Batches
from distill.data.sources import Document, DocumentSource
from distill.data.store import build_store
from distill.data.tokenizer import load_tokenizer
from distill.errors import InputError
from distill.types import SparseSignal, SparseTarget

FIELDS = ("tokens", "segments", "positions", "loss_mask")
ROWS = (23, 11)


@pytest.fixture(scope="module")
def stores(tokenizer_dir, tmp_path_factory):
  """Returns two token stores with as many rows as `ROWS` says; no two rows are equal."""
  directory, tokenizer = tmp_path_factory.mktemp("stores"), load_tokenizer(str(tokenizer_dir))
  made = []
  for name, rows in zip("ab", ROWS, strict=True):
    # A document a row: with the end, 7 bytes of 8 are used, and no two fit.
    documents = [Document(f"{name}#{i:04d}") for i in range(rows)]
    source = DocumentSource({"name": name}, name, documents.__iter__)
    made.append(build_store(source, tokenizer=tokenizer, length=8, directory=directory))
  assert tuple(store.rows for store in made) == ROWS
  return made


def equal(one, other):
  return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


def rows(batch):
  return [row.tobytes() for row in batch.tokens]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31 - 1), step=st.integers(0, 10**6), hosts=st.sampled_from([1, 2, 4]))
def test_a_batch_depends_only_on_seed_and_step_and_is_divided_among_hosts(seed, step, hosts, stores):
  def batches(rows=None):
    return Batches(stores, weights=[3.0, 1.0], batch_size=8, seed=seed, rows=rows)

  whole = batches()[step]
  assert equal(whole, batches()[step])
  parts = [batches(range(index, 8, hosts))[step] for index in range(hosts)]
  for name in FIELDS:
    joined = np.stack([getattr(part, name) for part in parts], axis=1).reshape(getattr(whole, name).shape)
    assert len(getattr(parts[0], name)) == 8 // hosts
    assert np.array_equal(joined, getattr(whole, name))


def test_another_seed_gives_another_order_of_rows(stores):
  one, other = (Batches(stores[:1], weights=[1.0], batch_size=16, seed=seed)[0] for seed in (7, 8))
  assert not equal(one, other)


def test_a_host_reads_its_own_rows_only(stores, monkeypatch):
  asked = []
  original = type(stores[0]).read
  monkeypatch.setattr(type(stores[0]), "read", lambda self, rows: asked.extend(rows) or original(self, rows))
  Batches(stores, weights=[1.0, 1.0], batch_size=8, seed=0, rows=(2, 5))[5]
  assert len(asked) == 2


def test_every_epoch_sees_every_row_once_in_an_order_of_its_own(stores):
  batches = Batches(stores[:1], weights=[1.0], batch_size=1, seed=0)
  epochs = [[rows(batches[epoch * ROWS[0] + i])[0] for i in range(ROWS[0])] for epoch in range(3)]
  stored = [row.tobytes() for row in stores[0].read(np.arange(ROWS[0]))["tokens"]]
  assert all(sorted(epoch) == sorted(stored) for epoch in epochs)
  assert len({tuple(order) for order in [stored, *epochs]}) == 4


@pytest.mark.parametrize("weights", [(3.0, 1.0), (0.3, 0.7), (1.0, 99.0)])
def test_stores_are_mixed_by_their_weights_and_each_is_shuffled_separately(weights, stores):
  batches = Batches(stores, weights=weights, batch_size=100, seed=0)
  first = {row.tobytes() for row in stores[0].read(np.arange(ROWS[0]))["tokens"]}
  drawn = [row for step in range(4) for row in rows(batches[step])]
  # Rounded to whole rows, and never further off.
  assert abs(sum(row in first for row in drawn) - len(drawn) * weights[0] / sum(weights)) < 1.5
  second = [row for row in drawn if row not in first]
  for start in range(0, len(second) - ROWS[1] + 1, ROWS[1]):
    assert len(set(second[start : start + ROWS[1]])) == ROWS[1]


def test_the_argument_first_makes_batches_continue_after_the_rows_of_earlier_stages(stores):
  common = {"weights": [3.0, 1.0], "seed": 7}
  whole, later = Batches(stores, batch_size=4, **common), Batches(stores, batch_size=2, first=12, **common)
  assert rows(whole[3]) == rows(later[0]) + rows(later[1])


def test_each_row_of_a_batch_gets_its_own_signal_from_a_teacher_cache(stores):
  def known(number):
    return lambda rows: SparseSignal(
      target=SparseTarget(
        ids=np.stack([rows, np.full_like(rows, number)], -1)[:, None], log_probs=rows[:, None, None], tail=rows[:, None]
      )
    )

  batches = Batches(stores, weights=[3.0, 1.0], batch_size=8, seed=7)
  batch = batches.with_signals([known(0), known(1)])[2]
  assert equal(batch, batches[2]) and batches[2].signal is None
  for tokens, (row, number) in zip(batch.tokens, batch.signal.target.ids[:, 0], strict=True):
    assert np.array_equal(tokens, stores[number].read(np.asarray([row]))["tokens"][0])
  assert {0, 1} == set(batch.signal.target.ids[:, 0, 1])


def test_batches_read_ahead_equal_those_read_directly_and_the_reading_thread_ends(stores):
  batches = Batches(stores, weights=[3.0, 1.0], batch_size=4, seed=7)
  before = threading.active_count()
  for step in (9, 10, 11, 15, 14):  # Also one that nobody expected.
    assert equal(batches.batch(step, {}), batches[step])
  assert threading.active_count() == before + 1
  del batches
  deadline = time.monotonic() + 10
  while threading.active_count() > before and time.monotonic() < deadline:
    time.sleep(0.01)
  assert threading.active_count() == before


def test_an_error_in_the_reading_thread_is_raised_by_batch(stores, monkeypatch):
  batches = Batches(stores, weights=[3.0, 1.0], batch_size=4, seed=7)

  def read(self, rows):
    raise InputError("the store is gone")

  monkeypatch.setattr(type(stores[0]), "read", read)
  with pytest.raises(InputError, match="the store is gone"):
    batches.batch(0, {})


@pytest.mark.parametrize(
  ("changed", "says"),
  [
    ({"weights": [1.0]}, "weights"),
    ({"weights": [1.0, 0.0]}, "weights"),
    ({"weights": [1.0, float("nan")]}, "weights"),
  ],
)
def test_the_error_for_invalid_weights_names_the_key(changed, says, stores):
  with pytest.raises(InputError, match=says):
    Batches(stores, **{"weights": [1.0, 1.0], "batch_size": 4, "seed": 0, **changed})


def test_stores_with_rows_of_different_lengths_are_refused(stores, tokenizer_dir, tmp_path):
  source = DocumentSource({}, "", [Document("old")].__iter__)
  other = build_store(source, tokenizer=load_tokenizer(str(tokenizer_dir)), length=9, directory=tmp_path)
  with pytest.raises(InputError, match=r"lengths \[8, 9\]"):
    Batches([stores[0], other], weights=[1.0, 1.0], batch_size=4, seed=0)
