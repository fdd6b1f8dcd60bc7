"""The evaluation section of a recipe."""

import pytest

from distill.configuration import read
from distill.errors import InputError
from distill.evaluation.config import EvaluationConfig


def test_an_empty_evaluation_section_has_no_skills_and_no_heldout_text():
  assert read(EvaluationConfig, {}, key="config.evaluation") == EvaluationConfig(skills=(), heldout=None)


def test_the_skills_list_of_a_recipe_is_read_into_a_tuple():
  given = {"skills": ["a.jsonl"], "heldout": {"kind": "text", "path": "b.txt"}}
  config = read(EvaluationConfig, given, key="config.evaluation")
  assert config.skills == ("a.jsonl",) and config.heldout == given["heldout"]


def test_a_skills_option_that_is_a_string_instead_of_a_list_is_refused():
  with pytest.raises(InputError, match=r"config\.evaluation\.skills: got 'a\.jsonl'; give a list"):
    read(EvaluationConfig, {"skills": "a.jsonl"}, key="config.evaluation")
