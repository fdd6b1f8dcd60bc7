"""Overrides of a configuration file's values."""

import pytest

from distill.cli import configuration
from distill.errors import InputError

KEY = "stages.1_align.optimizer.learning_rate"


def rate(recipe, text, key=KEY):
  resolved = configuration.load(str(recipe), overrides={key: text})
  _, stage, *rest = key.split(".")
  value = resolved["stages"][stage]
  for name in rest:
    value = value[name]
  return value


def test_a_number_and_a_schedule_stand_for_one_another(recipe):
  assert rate(recipe, "1e-6") == 1e-6
  schedule = {"kind": "cosine", "peak": 1e-3, "warmup": 2}
  assert rate(recipe, repr(schedule)) == schedule
  assert rate(recipe, "1e-6", key="stages.2_distill.optimizer.learning_rate") == 1e-6


@pytest.mark.parametrize("text", ["fast", "(1, 2)"])
def test_nothing_else_does(recipe, text):
  with pytest.raises(InputError, match=f"{KEY}=.*expected float"):
    rate(recipe, text)
