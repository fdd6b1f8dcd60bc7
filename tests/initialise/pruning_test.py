import numpy as np
import pytest

from distill.initialise.pruning import Heads, choose_heads, cut_channels, most_important, norm_correction, pick


def test_most_important_indices_are_ascending_and_ties_go_to_the_lower_index():
  np.testing.assert_array_equal(most_important(np.asarray([3.0, 1.0, 9.0, 3.0]), 2), [0, 2])
  np.testing.assert_array_equal(most_important(np.zeros(4), 3), [0, 1, 2])


SCORES = np.asarray([1.0, 5.0, 2.0, 3.0, 4.0, 9.0])


@pytest.mark.parametrize(
  "keys, retained, retained_keys, expected",
  [
    (3, 6, 3, Heads((0, 1, 2, 3, 4, 5), ((0,), (1,), (2,)))),
    (3, 3, 3, Heads((1, 3, 5), ((0,), (1,), (2,)))),
    (3, 2, 2, Heads((1, 5), ((0,), (2,)))),
    (3, 4, 2, Heads((0, 1, 4, 5), ((0,), (2,)))),
    (3, 4, 4, Heads((1, 3, 4, 5), ((0,), (1,), (2,), (2,)))),
    (2, 4, 2, Heads((1, 2, 4, 5), ((0,), (1,)))),
    (6, 4, 2, Heads((1, 3, 4, 5), ((1, 3), (4, 5)))),
    (6, 6, 1, Heads((0, 1, 2, 3, 4, 5), ((0, 1, 2, 3, 4, 5),))),
    (2, 8, 2, None),
    (3, 9, 3, None),
    (6, 7, 7, None),
  ],
)
def test_retained_query_heads_stay_with_the_key_heads_they_were_trained_with(keys, retained, retained_keys, expected):
  assert choose_heads(SCORES, keys=keys, retained=retained, retained_keys=retained_keys) == expected


def test_pick_selects_or_averages_units_such_as_heads_along_any_axis():
  value = np.arange(24.0).reshape(2, 12)
  np.testing.assert_array_equal(pick(value, [2, 0], axis=1, units=4), value[:, [6, 7, 8, 0, 1, 2]])
  np.testing.assert_array_equal(pick(value.T, [(0, 1)], axis=0, units=4), (value.T[:3] + value.T[3:6]) / 2)


def test_a_norm_with_fewer_inputs_is_corrected_by_their_share_of_the_mean_square():
  assert norm_correction(np.asarray([0.5, 0.5, 0.0, 0.0]), [0, 1]) == pytest.approx(np.sqrt(2.0))
  assert norm_correction(np.full(4, 0.25), [1, 3]) == pytest.approx(1.0)


def test_cut_channels_cuts_only_the_axis_of_the_residual_stream():
  channels = np.asarray([0, 2])
  for name, shape, cut in (
    ("embed.table", (5, 3), (5, 2)),
    ("head.kernel", (3, 5), (2, 5)),
    ("layers.1.mlp_norm.scale", (3,), (2,)),
    ("layers.1.mixer.q.kernel", (3, 4), (2, 4)),
    ("layers.1.mixer.o.kernel", (4, 3), (4, 2)),
    ("layers.1.mlp.experts.up.kernel", (2, 3, 4), (2, 2, 4)),
    ("layers.1.mlp.experts.down.kernel", (2, 4, 3), (2, 4, 2)),
    ("layers.1.mixer.conv.q.kernel", (4, 3), (4, 3)),
  ):
    assert cut_channels(name, np.zeros(shape), channels).shape == cut, name
