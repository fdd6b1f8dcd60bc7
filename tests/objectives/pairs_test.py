import pytest

from distill.errors import InputError
from tests.objectives.problem import bound


@pytest.mark.parametrize(
  ("kind", "pairs", "depths", "expected"),
  [
    ("hidden", "uniform", (3, 9), ((0, 2), (1, 5), (2, 8))),
    ("hidden", "uniform", (4, 11), ((0, 1), (1, 4), (2, 7), (3, 10))),
    ("hidden", "uniform", (3, 2), ((0, 0), (1, 0), (2, 1))),
    ("mixer_output", "uniform", (3, 8), ((0, 0), (1, 2), (2, 5))),
    ("block_output", "uniform", (3, 8), ((0, 0, 1), (1, 2, 4), (2, 5, 7))),
    ("hidden", {"last": 2}, (4, 11), ((2, 9), (3, 10))),
    ("relations", {"last": 1}, (2, 3), ((1, 2),)),
  ],
)
def test_the_pairs_options_uniform_and_last_expand_to_layer_pairs(kind, pairs, depths, expected):
  (term,) = bound({"kind": kind, "pairs": pairs}, student=depths[0], teacher=depths[1])
  assert term.pairs == expected


@pytest.mark.parametrize(
  ("kind", "expected"),
  [
    ("mixer_output", ((0, 1), (1, 3), (2, 6))),
    ("relations", ((0, 1), (1, 3), (2, 6))),
    ("block_output", ((0, 0, 2), (1, 3, 5), (2, 6, 7))),
    ("hidden", ((0, 2), (1, 5), (2, 7))),
  ],
)
def test_default_layer_pairs_follow_from_layers_from(kind, expected):
  (term,) = bound({"kind": kind}, student=3, teacher=8, layers_from=(1, 3, 6))
  assert term.pairs == expected


def test_default_layer_pairs_stay_empty_while_layers_from_is_unknown():
  (term,) = bound({"kind": "hidden"}, student=3, teacher=8, layers_from=None)
  assert term.pairs == () and term.teacher_capture().layers == ()


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ({"kind": "hidden"}, r"pairs: no layer pairs for a hidden term; give \(\(student layer, teacher layer\)"),
    ({"kind": "hidden", "layers_from": (1, 0)}, "pairs: no layer pairs for a hidden term"),
    ({"kind": "hidden", "pairs": "even"}, "pairs: got 'even'; give .* 'uniform' or {'last': k}"),
    (
      {"kind": "hidden", "pairs": {"last": 3}},
      "names a layer that does not exist; choose from the student's layers 0 to 1",
    ),
    ({"kind": "hidden", "pairs": {"last": 0}}, "'uniform' or {'last': k}"),
    ({"kind": "hidden", "pairs": ((0, "x"),)}, r"pairs\[0\]\[1\]: got 'x'; use a whole number"),
    ({"kind": "mixer_output", "pairs": ((0, 9),)}, r"\(0, 9\) names a layer that does not exist; .* teacher's 0 to 2"),
    (
      {"kind": "mixer_output", "pairs": ((0, 1, 2),)},
      r"\(0, 1, 2\) is not a layer pair; give \(student layer, teacher layer\)",
    ),
    ({"kind": "block_output", "pairs": ((0, 2, 1),)}, r"the last teacher layer of \(0, 2, 1\) comes before the first"),
    (
      {"kind": "hidden", "pairs": "uniform", "balanced": True},
      "balanced: the stage has no divergence or cross-entropy",
    ),
    ({"kind": "hidden", "pairs": "uniform", "balanced": 1}, "balanced: got 1; use True or False"),
    ({"kind": "hidden", "pairs": "uniform", "distance": "far"}, "distance: got 'far'; use one of 'mse', 'cosine'"),
  ],
)
def test_the_error_for_wrong_layer_pairs_names_the_key_of_the_term(spec, message):
  layers_from = {"layers_from": spec["layers_from"]} if "layers_from" in spec else {}
  spec = {name: value for name, value in spec.items() if name != "layers_from"}
  with pytest.raises(InputError, match=r"config\.stages\.a\.terms\[0\].*" + message):
    bound(spec, student=2, teacher=3, **layers_from)
