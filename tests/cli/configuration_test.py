"""Overrides of a recipe's values on the command line."""

import pytest

from distill.cli import configuration
from distill.errors import InputError
from distill.schedules import CosineScheduleConfig

KEY = "stages.align.optimizer.learning_rate"


def load(recipe, **overrides):
  return configuration.load(str(recipe), overrides=overrides)


def test_an_override_may_replace_a_number_by_a_schedule_and_back(recipe):
  assert load(recipe, **{KEY: "1e-6"}).stages[0].optimizer.learning_rate == 1e-6
  schedule = {"kind": "cosine", "peak": 1e-3, "warmup": 2}
  found = load(recipe, **{KEY: repr(schedule)}).stages[0].optimizer.learning_rate
  assert found == CosineScheduleConfig(peak=1e-3, warmup=2)
  assert load(recipe, **{"stages.distill.optimizer.learning_rate": "1"}).stages[1].optimizer.learning_rate == 1.0


@pytest.mark.parametrize("text", ["fast", "(1, 2)", "True", "-1"])
def test_a_learning_rate_that_is_no_number_or_schedule_is_refused(recipe, text):
  with pytest.raises(InputError, match=rf"config\.{KEY}: .*; use a number of at least 0"):
    load(recipe, **{KEY: text})


def test_an_override_finds_a_stage_by_its_name_or_its_index(recipe):
  by_name, by_place = (load(recipe, **{f"stages.{key}.steps": "5"}) for key in ("distill", "1"))
  assert [stage.steps for stage in by_name.stages] == [6, 5] and by_name == by_place


def test_an_override_may_replace_one_value_of_a_schedule_or_a_term(recipe):
  config = load(recipe, **{"stages.distill.optimizer.learning_rate.warmup": "2", "stages.distill.terms.1.weight": "3"})
  assert config.stages[1].optimizer.learning_rate == CosineScheduleConfig(peak=3e-3, warmup=2)
  assert config.stages[1].terms[1]["weight"] == 3


def test_a_section_that_the_recipe_leaves_out_may_be_overridden(recipe):
  assert load(recipe, **{"evaluation.skills": "('a.jsonl',)"}).evaluation.skills == ("a.jsonl",)
  assert load(recipe, **{"stages.align.optimizer.weight_decay": "0.5"}).stages[0].optimizer.weight_decay == 0.5


@pytest.mark.parametrize(
  ("key", "message"),
  [
    ("stages.destill.steps", "--config.stages.destill.steps: the list has no element 'destill'; did you mean distill?"),
    ("stages.2.steps", "--config.stages.2.steps: the list has no element '2'; use one of align, distill"),
    ("stages.align.step", "config.stages.align.step: unknown key; did you mean config.stages.align.steps?"),
    ("sead", "config.sead: unknown key; did you mean config.seed?"),
    ("training.batch_size.x", "--config.training.batch_size.x: 16 is neither a dict nor a list, so it has no 'x'"),
  ],
)
def test_the_error_for_an_override_of_an_unknown_key_names_the_key_and_what_may_replace_it(recipe, key, message):
  with pytest.raises(InputError) as error:
    load(recipe, **{key: "1"})
  assert message in str(error.value)
