import numpy as np
import pytest

from distill.adapters.edits import Addition, LowRank, Replacement, TokenRows, apply_edit

RNG = np.random.default_rng(0)
BASE = RNG.normal(size=(5, 4)).astype(np.float32)
A, B = RNG.normal(size=(5, 2)).astype(np.float32), RNG.normal(size=(2, 4)).astype(np.float32)


def test_a_stack_weight_scales_the_change_of_plain_lora():
  after = apply_edit(LowRank(a=A, b=B, scale=0.5), BASE, trained_on=BASE, weight=0.25)
  np.testing.assert_allclose(after, BASE + 0.125 * A @ B, rtol=1e-6)


def test_dora_sets_the_norm_of_each_column_to_its_magnitude():
  magnitude = np.float32([1, 2, 3, 4])
  after = apply_edit(LowRank(a=A, b=B, scale=0.5, magnitude=magnitude), BASE, trained_on=BASE, weight=1.0)
  np.testing.assert_allclose(np.linalg.norm(after, axis=0), magnitude, rtol=1e-6)


def test_the_norm_computed_from_lora_factors_equals_that_of_the_whole_change():
  edit = LowRank(a=A, b=B, scale=0.5)
  assert edit.norm == pytest.approx(np.linalg.norm(edit.delta), rel=1e-5)


def test_a_replacement_trained_on_the_base_adds_its_change_from_the_base_to_the_current_parameter():
  current, value = BASE + 1, BASE * 2
  np.testing.assert_allclose(
    apply_edit(Replacement(value=value), current, trained_on=BASE, weight=1.0), current + BASE, rtol=1e-5, atol=1e-6
  )
  np.testing.assert_array_equal(apply_edit(Replacement(value=value), BASE, trained_on=BASE, weight=1.0), value)


def test_rows_of_added_tokens_are_copied_whatever_the_weight_of_the_adapter_in_the_stack():
  value = RNG.normal(size=(7, 4)).astype(np.float32)
  after = apply_edit(Replacement(value=value), BASE, trained_on=BASE, weight=0.5)
  np.testing.assert_array_equal(after[5:], value[5:])
  np.testing.assert_allclose(after[:5], (BASE + value[:5]) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_token_rows_change_only_the_listed_tokens(axis):
  table = BASE if axis == 0 else BASE.T
  edit = TokenRows(indices=np.asarray([3, 1]), values=np.zeros((2, 4), np.float32), axis=axis)
  after = np.moveaxis(apply_edit(edit, table, trained_on=table, weight=1.0), axis, 0)
  assert not after[[1, 3]].any()
  np.testing.assert_array_equal(after[[0, 2, 4]], BASE[[0, 2, 4]])


def test_a_bias_addition_is_scaled_by_the_weight_of_its_adapter_in_the_stack():
  after = apply_edit(
    Addition(value=np.ones(4, np.float32)), np.zeros(4, np.float32), trained_on=np.zeros(4), weight=0.5
  )
  np.testing.assert_array_equal(after, np.full(4, 0.5))
