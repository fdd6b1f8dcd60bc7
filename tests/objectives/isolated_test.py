"""Losses of student layers that run on the teacher's inputs, as in the first two stages of a conversion."""

import jax
import numpy as np
import pytest

from distill.errors import InputError
from distill.objectives.objective import needs_student
from distill.teachers.live import LiveTeacher
from tests.objectives.problem import bound
from tests.objectives.steps import DELTA, SOFT, decoder, trained


@pytest.mark.parametrize("kind", ["mixer_output", "block_output"])
def test_losses_of_isolated_layers_train_only_the_parameters_that_the_stage_selects(kind):
  student, model = decoder(DELTA, DELTA), decoder(SOFT, SOFT, SOFT, SOFT)
  teacher = LiveTeacher(decoder=model, params=model.init(jax.random.key(1)))
  terms = bound({"kind": kind}, steps=30, student=2, teacher=4, layers_from=(0, 2))
  assert not needs_student(terms)
  params = {f"student.{name}": x for name, x in student.init(jax.random.key(0)).items()}
  after, losses = trained(
    student,
    params,
    terms=terms,
    teacher=teacher,
    steps=30,
    train=((r"student\.layers\..*\.mixer\..*", 1.0), (".*", 0.0)),
  )
  assert losses[-1] < 0.8 * losses[0]
  for name, value in params.items():
    assert np.array_equal(value, after[name]) != (".mixer." in name), name


def test_losses_of_isolated_layers_are_zero_for_a_student_equal_to_its_teacher():
  model = decoder(SOFT, SOFT, SOFT)
  weights = model.init(jax.random.key(1))
  specs = [{"kind": "mixer_output"}, {"kind": "block_output"}, {"kind": "relations", "heads": 4}]
  terms = bound(*specs, steps=1, student=3, teacher=3, layers_from=(0, 1, 2))
  params = {f"student.{name}": x for name, x in weights.items()}
  _, losses = trained(model, params, terms=terms, teacher=LiveTeacher(decoder=model, params=weights), steps=1)
  assert losses[0] < 1e-9


@pytest.mark.parametrize("kind", ["mixer_output", "block_output"])
def test_losses_of_isolated_layers_refuse_a_student_of_another_width_than_the_teachers(kind):
  with pytest.raises(InputError, match=rf"terms\[0\]: {kind} runs .* \(width 16\) .* \(width 24\), which needs equal"):
    bound({"kind": kind}, layers_from=(1,), teacher_width=24)
