"""Tests of the rows that are sampled to measure a model: distinct rows, in whole batches."""

import numpy as np
import pytest

from distill.data.calibration import sample
from distill.data.sources import Document, DocumentSource
from distill.data.store import build_store
from distill.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def store(tokenizer_dir, tmp_path_factory):
  """Returns a token store whose rows all differ."""
  documents = [Document(f"{number} old model teaches") for number in range(30)]
  source = DocumentSource({}, "", documents.__iter__)
  tokenizer = load_tokenizer(str(tokenizer_dir))
  return build_store(source, tokenizer=tokenizer, length=8, directory=tmp_path_factory.mktemp("stores"))


def test_sampled_rows_are_distinct_and_the_last_batch_is_padded(store):
  batches = sample(store, rows=6, batch_size=4, seed=0)
  assert [batch.tokens.shape for batch in batches] == [(4, 8), (4, 8)]
  real = [np.asarray(batch.segments).any(axis=1) for batch in batches]
  assert [int(rows.sum()) for rows in real] == [4, 2]
  assert not np.asarray(batches[1].loss_mask)[~real[1]].any()
  rows = np.concatenate([np.asarray(batch.tokens)[here] for batch, here in zip(batches, real, strict=True)])
  assert len(np.unique(rows, axis=0)) == 6


def test_sampling_more_rows_than_a_store_has_returns_all_of_its_rows(store):
  batches = sample(store, rows=10**6, batch_size=4, seed=1)
  assert sum(int(np.asarray(batch.segments).any(axis=1).sum()) for batch in batches) == store.rows
