"""Samples rows of a token store, on which a model is measured."""

import numpy as np

from distill.data.store import TokenStore
from distill.types import Batch


def sample(store: TokenStore, *, rows: int, batch_size: int, seed: int) -> list[Batch]:
  """Returns `rows` distinct rows of a store, drawn at random, in batches; padding completes the last batch.

  Args:
    store: The store.
    rows: Number of rows to draw; a store with fewer gives all of its rows.
    batch_size: Rows of a batch, B.
    seed: Seed of the choice.
  """
  chosen = np.random.default_rng(seed).permutation(store.rows)[:rows]
  batches = []
  for first in range(0, len(chosen), batch_size):
    part = chosen[first : first + batch_size]
    fields = store.read(np.resize(part, batch_size))
    real = np.arange(batch_size)[:, None] < len(part)
    fields["segments"], fields["loss_mask"] = fields["segments"] * real, fields["loss_mask"] * real
    batches.append(Batch(**fields))
  return batches
