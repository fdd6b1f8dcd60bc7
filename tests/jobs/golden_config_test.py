"""Compares the quick start's resolved configuration with a committed file, so that every change of it is seen."""

import dataclasses
import json
import pathlib
import sys

from configs import cached
from configs.quickstart import get_config
from distill.demo import ROOT
from distill.jobs.config import resolve

GOLDEN = pathlib.Path(__file__).with_name("golden_config.json")
HOW = """
The configuration that the quick start resolves to is no longer the one in tests/jobs/golden_config.json.
A new option, another default or a change to the recipe is a reason to update the file; a refactoring is none, because
every run that somebody has begun is then refused as another run's. If the change is meant, write the file anew with

    python -m tests.jobs.golden_config_test

and say in the commit what changed for runs that exist.
"""


def resolved() -> str:
  """Returns the quick start's configuration as JSON, with the demonstration's directory written as DEMO."""
  values = dataclasses.asdict(resolve(get_config()))
  return json.dumps(values, indent=1).replace(str(ROOT), "DEMO") + "\n"


def test_the_quick_start_resolves_to_the_committed_configuration():
  assert resolved() == GOLDEN.read_text(), HOW


def test_the_recipe_with_a_teacher_cache_has_the_same_models_data_and_evaluation_as_the_quick_start():
  recipes = resolve(get_config()), resolve(cached.get_config())
  for section in ("seed", "teacher", "student", "data", "training", "evaluation"):
    first, second = (getattr(recipe, section) for recipe in recipes)
    assert first == second, section


if __name__ == "__main__":
  GOLDEN.write_text(resolved())
  print(f"wrote {GOLDEN}", file=sys.stderr)
