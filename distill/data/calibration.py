"""A few rows of a store, to measure a model on."""

import numpy as np

from distill.data.store import TokenStore
from distill.types import Batch


def sample(store: TokenStore, *, rows: int, batch_size: int, seed: int) -> list[Batch]:
  """At most `rows` different rows in batches of `batch_size`; the last is filled up with padding.

  Args:
    store: Where they are.
    rows: How many; a store with fewer gives all of them.
    batch_size: Rows a batch.
    seed: Of the choice.
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
