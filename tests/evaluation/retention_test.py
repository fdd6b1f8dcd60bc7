"""Retention is the student's share of the teacher's chance-corrected gain, with bootstrap intervals."""

import numpy as np

from distill.evaluation.retention import accuracy, retention


def answers(right, count=400):
  return np.arange(count) < right


def test_retention_is_the_students_share_of_the_teachers_chance_corrected_gain():
  retained = retention(base=answers(100), teacher=answers(300), student=answers(260), chance=0.25)
  np.testing.assert_allclose(retained.value, 0.8)
  assert 0.7 < retained.low < 0.8 < retained.high < 0.9


def test_an_accuracy_below_chance_counts_as_chance_in_the_retention():
  below = retention(base=answers(40), teacher=answers(300), student=answers(100), chance=0.25)
  np.testing.assert_allclose(below.value, 0.0)


def test_retention_is_none_if_the_teacher_gains_nothing_over_the_base():
  assert retention(base=answers(100), teacher=answers(90), student=answers(95), chance=0.2) is None


def test_the_bootstrap_interval_of_an_accuracy_matches_the_binomial_interval():
  got = accuracy(answers(100))
  width = 1.96 * np.sqrt(0.25 * 0.75 / 400)
  np.testing.assert_allclose([got.low, got.high], [0.25 - width, 0.25 + width], atol=0.01)
