import pytest

from distill.errors import InputError
from distill.objectives.terms import TERMS
from tests.objectives.problem import bound


def test_the_keys_of_TERMS_are_the_kinds_of_its_classes():
  assert {name: cls.kind for name, cls in TERMS.items()} == {name: name for name in TERMS}


@pytest.mark.parametrize(
  ("specs", "message"),
  [
    ([{"kind": "kl"}], r"\[0\]\.kind: unknown term 'kl'; use one of forward_kl"),
    ([{"kind": 3}], r"\[0\]\.kind: unknown term 3"),
    (["forward_kl"], r"\[0\]: 'forward_kl' is not a term; give a dict with a kind"),
    ([{"kind": "cross_entropy", "temperature": 2.0}], r"\[0\]\.temperature: unknown key"),
    ([{"kind": "cross_entropy"}, {"kind": "z_loss", "weight": "x"}], r"\[1\]\.weight: got 'x'"),
    ([{"kind": "z_loss", "weight": {"kind": "steep"}}], r"\[0\]\.weight\.kind: got 'steep'"),
    ([{"kind": "balance"}], r"\[0\]: the balance term needs an MoE student"),
    ([], "a stage needs at least one term"),
  ],
)
def test_the_error_for_a_wrong_kind_or_option_of_a_term_gives_the_place_of_the_term_in_the_recipe(specs, message):
  with pytest.raises(InputError, match=r"config\.stages\.a\.terms.*" + message):
    bound(*specs)
