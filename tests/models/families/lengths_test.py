"""Families with state spaces against transformers at lengths around and beyond a chunk."""

import numpy as np
import pytest

from tests.models.families import reference
from tests.models.families.cases import FIRST

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("length", [1, 7, 64, 65, 300])
@pytest.mark.parametrize("family", ["mamba2", "bamba", "granitemoehybrid"])
def test_logits_equal_transformers_at_every_length(family, length):
  directory, model = reference.built(*next(one for one in FIRST if one[0] == family))
  rows = np.random.default_rng(length).integers(3, 97, (2, length))
  logits, hidden = reference.expected(model, rows)
  found = reference.ours(directory, rows)["float32"]
  error, worst = reference.distance(found[0], logits), max(map(reference.distance, found[1], hidden))
  print(f"{family:16} {length:4} float32 {error:.1e} hidden {worst:.1e}")
  assert max(error, worst) <= 1e-5
