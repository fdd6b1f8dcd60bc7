import numpy as np
import pytest

from distill.errors import InputError
from distill.losses.divergences import LOGIT_DIVERGENCES, forward_kl
from distill.teachers.targets import Sampled, TopK
from tests.objectives.problem import bound, inputs, sums

KINDS = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation", "alpha_beta", "dkd")


def test_the_loss_is_the_sum_of_the_means_of_all_divergence_terms():
  total, parts = sums(bound(*({"kind": kind} for kind in KINDS)), inputs(2))
  values = np.asarray(list(parts.values()))
  assert (values > 0).all() and len(set(values.round(4))) == len(KINDS)
  np.testing.assert_allclose(total, values.sum(), rtol=1e-5)


def test_the_forward_kl_term_computes_from_logits_instead_of_log_probabilities(monkeypatch):
  right, seen = LOGIT_DIVERGENCES[forward_kl], []
  monkeypatch.setitem(LOGIT_DIVERGENCES, forward_kl, lambda *logits: (seen.append(logits), right(*logits))[1])
  sums(bound({"kind": "forward_kl"}), inputs(1))
  assert seen


def test_a_divergence_is_multiplied_by_the_squared_temperature_unless_temperature_squared_is_false():
  term = {"kind": "reverse_kl", "temperature": 3.0}
  _, parts = sums(bound(term, {**term, "temperature_squared": False}), inputs(1))
  np.testing.assert_allclose(parts["0_reverse_kl"], 9.0 * parts["1_reverse_kl"], rtol=1e-6)


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ({"kind": "jsd", "beta": 1.5}, r"beta: got 1\.5; use a number of at least 0 and of at most 1"),
    ({"kind": "jsd", "beta": "half"}, "beta: got 'half'"),
    ({"kind": "skew_kl", "alpha": 1.0}, r"alpha: got 1\.0, .* use a number below 1"),
    ({"kind": "alpha_beta", "alpha": 1.0, "beta": -1.0}, "is 0, which is not allowed"),
    ({"kind": "forward_kl", "temperature": 0}, "temperature: got 0"),
    ({"kind": "forward_kl", "temperature": {"kind": "linear", "start": 2, "end": 0}}, "temperature: "),
  ],
)
def test_the_error_for_a_divergence_option_out_of_range_names_the_key_of_the_term(spec, message):
  with pytest.raises(InputError, match=r"config\.stages\.a\.terms\[0\].*" + message):
    bound(spec)


@pytest.mark.parametrize(
  ("spec", "targets", "message"),
  [
    ({"kind": "reverse_kl"}, Sampled(size=9), r"terms\[0\]\.kind: the gradient of reverse_kl is biased"),
    ({"kind": "taid"}, Sampled(size=9), r"terms\[0\]\.kind: the gradient of taid is biased"),
    (
      {"kind": "forward_kl", "temperature": 2.0},
      TopK(),
      r"terms\[0\]\.temperature is 2\.0, but .* made at temperature 1",
    ),
  ],
)
def test_cached_targets_that_a_divergence_cannot_use_are_refused(spec, targets, message):
  (term,) = bound(spec)
  with pytest.raises(InputError, match=message):
    term.check_targets(targets, key="terms[0]")


def test_forward_kl_accepts_sampled_targets_and_every_divergence_accepts_top_k_targets():
  bound({"kind": "forward_kl"})[0].check_targets(Sampled(size=9), key="")
  for term in bound(*({"kind": kind} for kind in KINDS), {"kind": "cross_entropy"}):
    term.check_targets(TopK(), key="")
