import dataclasses

import numpy as np
import pytest

from distill.errors import InputError
from distill.initialise.transfer import choose_layers
from tests.initialise.students import LAYER, TEACHER, assert_equal_logits, random, start


def test_a_student_of_the_same_architecture_gets_all_parameters_of_its_teacher():
  teacher = random(TEACHER, 0)
  made = start(TEACHER, teacher, TEACHER)
  assert set(made.taken) == set(made.params)
  assert_equal_logits(TEACHER, made.params, TEACHER, teacher)


def test_a_layers_from_list_of_another_length_than_the_students_layers_is_refused():
  with pytest.raises(InputError, match="layers_from"):
    start(TEACHER, random(TEACHER, 0), TEACHER, (0, 1))


def test_layers_from_importance_is_refused_for_a_student_deeper_than_its_teacher():
  with pytest.raises(InputError, match="the student has 4 layers and the teacher only 3"):
    choose_layers(
      "importance", config=dataclasses.replace(TEACHER, layers=(LAYER,) * 4), teacher=TEACHER, importance=None
    )


def test_a_student_wider_than_its_teacher_is_refused():
  config = dataclasses.replace(TEACHER, width=24)
  with pytest.raises(InputError, match="width 24 is above"):
    start(TEACHER, random(TEACHER, 0), config)


NORMS = {
  "pre": {},
  "offset, both": {"norms": "both", "norm_offset": 1.0},
  "post": {"norms": "post"},
  "untied, scaled": {"tie_embeddings": False, "embed_scale": 4.0, "logit_scale": 0.5},
}


@pytest.mark.parametrize("changes", NORMS.values(), ids=NORMS)
def test_channels_that_are_always_zero_are_removed_without_changing_logits(changes):
  wide = dataclasses.replace(TEACHER, norm_eps=1e-9, **changes)
  teacher = random(wide, 0)
  gone = [1, 6, 7, 12]
  for name, x in teacher.items():
    if name == "embed.table" or name.endswith(("o.kernel", "down.kernel")):
      x = np.array(x)
      x[:, gone] = 0.0
      teacher[name] = x
  narrow = dataclasses.replace(wide, width=12)
  made = start(wide, teacher, narrow)
  np.testing.assert_array_equal(made.channels, np.setdiff1d(np.arange(16), gone))
  assert set(made.taken) == set(made.params)
  assert_equal_logits(narrow, made.params, wide, teacher)


def test_layers_from_importance_leaves_out_a_layer_that_adds_nothing_to_its_input():
  teacher = random(TEACHER, 0)
  for name, x in teacher.items():
    if name.startswith("layers.1.") and name.endswith(("o.kernel", "down.kernel")):
      teacher[name] = np.zeros_like(x)
  config = dataclasses.replace(TEACHER, layers=(LAYER,) * 2)
  made = start(TEACHER, teacher, config, "importance")
  assert [one.layer for one in made.retained] == [0, 2]
  assert_equal_logits(config, made.params, TEACHER, teacher)
