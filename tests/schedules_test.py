"""Schedules have the right values at their ends, and invalid ones are refused."""

import re

import pytest

from distill.errors import InputError
from distill.schedules import schedule


def test_schedules_have_their_configured_values_at_start_peak_and_end():
  constant = schedule(0.5, key="lr", steps=10)
  assert constant(0) == constant(9) == 0.5
  linear = schedule({"kind": "linear", "start": 1.0, "end": 3.0}, key="lr", steps=11)
  assert (linear(0), linear(5), linear(10)) == (1.0, 2.0, 3.0)
  cosine = schedule({"kind": "cosine", "peak": 1.0, "end": 0.1, "warmup": 4}, key="lr", steps=20)
  assert cosine(0) == 0 and cosine(4) == 1.0
  assert float(cosine(20)) == pytest.approx(0.1)


def test_every_step_of_a_warm_up_is_below_the_peak():
  rate = schedule({"kind": "cosine", "peak": 1.0, "warmup": 3}, key="rate", steps=4)
  assert [float(rate(step)) for step in range(4)] == pytest.approx([0, 1 / 3, 2 / 3, 1])


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ({"kind": "cosin"}, "rate.kind: got 'cosin'; did you mean 'cosine'?"),
    ({"kind": "linear", "start": 1}, "rate.end: this required key is missing"),
    ({"kind": "linear", "start": 1, "end": 2, "ends": 3}, "rate.ends: unknown key; did you mean rate.end?"),
    ({"kind": "cosine", "peak": True}, "rate.peak: got True; use a number"),
    ({"kind": "cosine", "peak": 1, "warmup": 0.1}, "rate.warmup: got 0.1; use a whole number of at least 0"),
    ({"kind": "cosine", "peak": 1, "warmup": 10}, "rate.warmup: got 10 steps, but the stage has only 10; use fewer"),
    ({"kind": "linear", "start": 4, "end": -1}, "use numbers of at least 0 at every step"),
    (-1e-3, "rate: got -0.001; use numbers of at least 0 at every step"),
    (float("nan"), "rate: got nan; use numbers of at least 0 at every step"),
    ("0.1", "rate: got '0.1'; use a number, or a dict with a kind"),
    (True, "rate: got True; use a number, or a dict with a kind"),
  ],
)
def test_the_error_for_a_wrong_schedule_names_its_key(spec, message):
  with pytest.raises(InputError, match=re.escape(message)):
    schedule(spec, key="rate", steps=10, least=0)


def test_a_schedule_that_must_be_positive_may_not_end_at_zero():
  with pytest.raises(InputError, match="temperature: .* use numbers above 0 at every step"):
    schedule({"kind": "linear", "start": 4, "end": 0}, key="temperature", steps=10, above=0)
