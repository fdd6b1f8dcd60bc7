"""Samples rows of a token store, for measurements of a model."""

import numpy as np

from distill.data.store import TokenStore
from distill.types import Batch


def sample(store: TokenStore, *, rows: int, batch_size: int, seed: int) -> list[Batch]:
  """Returns `rows` distinct rows of a store, drawn at random, in batches; padding completes the last batch.

  Args:
    store: Token store to draw from.
    rows: Number of rows to draw; all rows are drawn if the store has fewer.
    batch_size: Number of rows B of a batch.
    seed: Seed of the random choice.
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
