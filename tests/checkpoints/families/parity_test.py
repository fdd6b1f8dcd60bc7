"""Every family against transformers: logits and every layer's hidden state."""

import pytest

from tests.checkpoints.families import reference
from tests.checkpoints.families.cases import FIRST, NAMES

CASES = [pytest.param(*one, id="-".join(one), marks=() if one in FIRST else pytest.mark.slow) for one in NAMES]


@pytest.mark.parametrize(("family", "case"), CASES)
def test_logits_and_hidden_states_equal_those_of_transformers(family, case):
  directory, model = reference.built(family, case)
  errors = reference.measure(directory, model)
  print(f"{family:13} {case:50} " + " ".join(f"{name} {value:.1e}" for name, value in errors.items()))
  assert errors["float32"] <= 1e-5
  assert errors["hidden"] <= 1e-5
  assert errors["bfloat16"] <= 2e-2
