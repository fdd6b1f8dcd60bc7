import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from distill.errors import InputError
from distill.losses.divergences import LOGIT_DIVERGENCES, forward_kl
from distill.objectives.objective import IsolatedOutputs, LossContext, counts, initial_states, loss_sums, next_states
from distill.objectives.terms import build_terms
from distill.types import Batch, DenseSignal, ModelOutput, Readout


def problem(rows):
  rng = np.random.default_rng(0)

  def array(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  segments = jnp.asarray(np.repeat([[1, 2, 0]], [4, 3, 2], axis=1).repeat(rows, 0))
  mask = jnp.asarray(np.asarray([[1, 1, 1, 0, 1, 1, 0, 0, 0]], np.float32).repeat(rows, 0))
  batch = Batch(
    tokens=jnp.asarray(rng.integers(0, 11, (rows, 9))), segments=segments, positions=segments, loss_mask=mask
  )
  output = ModelOutput(
    hidden=array(rows, 9, 6), layers={0: array(rows, 9, 6)}, readout=Readout(kernel=array(6, 11), vocab_size=11)
  )
  signal = DenseSignal(
    hidden=array(rows, 9, 5), layers={2: array(rows, 9, 5)}, readout=Readout(kernel=array(5, 11), vocab_size=11)
  )
  return output, signal, batch, {"0_2.kernel": array(6, 5)}


def sums(terms, output, signal, batch, projectors, *, states=None):
  return loss_sums(
    terms,
    output=output,
    signal=signal,
    isolated=IsolatedOutputs(),
    batch=batch,
    projectors=projectors,
    context=LossContext(step=jnp.zeros(()), totals=counts(batch), states=states or {}, shards=1),
  )


TERMS = (
  {"kind": "forward_kl", "weight": 0.7, "temperature": 2.0},
  {"kind": "cross_entropy", "weight": 0.2},
  {"kind": "hidden", "weight": 0.5, "pairs": ((0, 2),)},
)


def test_the_loss_is_the_sum_of_plain_means_over_valid_tokens():
  given = output, signal, batch, projectors = problem(3)
  terms = build_terms(TERMS, key="terms", steps=10, depths=(1, 3))
  got, parts = sums(terms, *given)
  student, teacher = (np.asarray(x.readout.logits(x.hidden), np.float64) for x in (output, signal))

  def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)

  mask = np.asarray(batch.loss_mask)
  p, q = softmax(teacher / 2), softmax(student / 2)
  kl = 4 * (mask * (p * np.log(p / q)).sum(-1)).sum() / mask.sum()
  labels = np.roll(np.asarray(batch.tokens), -1, axis=1)
  nll = -np.log(np.take_along_axis(softmax(student), labels[..., None], -1)[..., 0])
  ce = (mask * nll).sum() / mask.sum()
  present = np.asarray(batch.segments) > 0
  mapped = np.asarray(output.layers[0], np.float64) @ np.asarray(projectors["0_2.kernel"], np.float64)
  wanted = np.asarray(signal.layers[2], np.float64)
  far = ((mapped - wanted) ** 2).sum(-1) / (wanted**2).sum(-1)
  hidden = (present * far).sum() / present.sum()
  np.testing.assert_allclose(list(parts.values()), [kl, ce, hidden], rtol=1e-5)
  np.testing.assert_allclose(got, 0.7 * kl + 0.2 * ce + 0.5 * hidden, rtol=1e-5)


def test_every_divergence_is_a_term_and_taid_moves_towards_its_teacher():
  given = problem(2)
  kinds = ["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation", "alpha_beta"]
  specs = [{"kind": kind} for kind in [*kinds, "dkd", "taid", "z_loss"]]
  terms = build_terms(specs, key="terms", steps=10, depths=(1, 3))
  states = initial_states(terms)
  assert list(states) == ["8"]
  total, parts = sums(terms, *given, states=states)
  assert all(float(value) > 0 for value in parts.values()) and np.isclose(total, sum(parts.values()))
  assert parts["8_taid"] < parts["0_forward_kl"]
  seen = []
  for step in range(4):
    states = next_states(terms, states, parts=parts, step=jnp.int32(step), progress=jnp.float32((step + 1) / 4))
    seen.append(float(states["8"]["t"]))
  np.testing.assert_allclose(seen, [0.55, 0.7, 0.85, 1.0], atol=1e-3)


def test_forward_kl_is_formed_from_logits(monkeypatch):
  right, seen = LOGIT_DIVERGENCES[forward_kl], []
  monkeypatch.setitem(LOGIT_DIVERGENCES, forward_kl, lambda *logits: (seen.append(logits), right(*logits))[1])
  terms = build_terms([{"kind": "forward_kl"}], key="terms", steps=1, depths=(1, 3))
  sums(terms, *problem(2))
  assert seen


def test_a_balanced_term_pulls_as_much_as_the_logits_did_a_step_before():
  given = problem(2)
  specs = [{"kind": "forward_kl", "weight": 3.0}, {"kind": "z_loss"}, {**TERMS[2], "balanced": True}]
  terms = build_terms(specs, key="terms", steps=10, depths=(1, 3))
  states = initial_states(terms)
  first, parts = sums(terms, *given, states=states)
  kl, z, hidden = parts.values()
  np.testing.assert_allclose(first, 3.0 * kl + z + 0.5 * hidden, rtol=1e-6)
  states = next_states(terms, states, parts=parts, step=jnp.int32(0), progress=jnp.float32(0.1))
  np.testing.assert_allclose(sums(terms, *given, states=states)[0], 3.0 * kl + z + 0.5 * 3.0 * kl, rtol=1e-6)


@pytest.mark.parametrize(
  ("kind", "pairs", "depths", "expected"),
  [
    ("hidden", "uniform", (3, 9), ((0, 2), (1, 5), (2, 8))),
    ("hidden", "uniform", (4, 11), ((0, 1), (1, 4), (2, 7), (3, 10))),
    ("hidden", "uniform", (3, 2), ((0, 0), (1, 0), (2, 1))),
    ("mixer_output", "uniform", (3, 8), ((0, 0), (1, 2), (2, 5))),
    ("block_output", "uniform", (3, 8), ((0, 0, 1), (1, 2, 4), (2, 5, 7))),
    ("hidden", {"last": 2}, (4, 11), ((2, 9), (3, 10))),
  ],
)
def test_pairs_may_be_named_by_how_layers_spread(kind, pairs, depths, expected):
  (term,) = build_terms([{"kind": kind, "pairs": pairs}], key="terms", steps=1, depths=depths)
  assert term.pairs == expected


def test_balance_counts_each_row_by_its_tokens_and_shares_of_it_add_up():
  output, _, batch, _ = problem(4)
  lengths = np.asarray([9, 4, 0, 2])
  segments = jnp.asarray(np.arange(9) < lengths[:, None], int)
  balance = jnp.asarray([1.0, 1.5, 9.0, 2.0])
  terms = build_terms([{"kind": "balance", "weight": 0.1}], key="terms", steps=10, depths=(1, 3))
  totals = counts(dataclasses.replace(batch, segments=segments))

  def part(*rows):
    rows = np.asarray(rows)
    share = {name: getattr(batch, name)[rows] for name in ("tokens", "positions", "loss_mask")}
    return loss_sums(
      terms,
      output=dataclasses.replace(output, balance=balance[rows]),
      signal=None,
      isolated=IsolatedOutputs(),
      batch=Batch(**share, segments=segments[rows]),
      projectors={},
      context=LossContext(step=jnp.zeros(()), totals=totals, states={}, shards=1),
    )[0]

  expected = 0.1 * (9 * 1.0 + 4 * 1.5 + 2 * 2.0) / 15
  np.testing.assert_allclose([part(0, 1, 2, 3), part(0, 2) + part(1, 3)], expected, rtol=1e-6)


def test_shares_of_micro_batches_add_up():
  output, signal, batch, projectors = problem(4)
  terms = build_terms(TERMS, key="terms", steps=10, depths=(1, 3))

  def part(rows):
    def cut(x):
      return x[rows]

    return loss_sums(
      terms,
      output=ModelOutput(hidden=cut(output.hidden), layers={0: cut(output.layers[0])}, readout=output.readout),
      signal=DenseSignal(hidden=cut(signal.hidden), layers={2: cut(signal.layers[2])}, readout=signal.readout),
      isolated=IsolatedOutputs(),
      batch=Batch(**{name: cut(getattr(batch, name)) for name in ("tokens", "segments", "positions", "loss_mask")}),
      projectors=projectors,
      context=LossContext(step=jnp.zeros(()), totals=counts(batch), states={}, shards=1),
    )[0]

  np.testing.assert_allclose(part(slice(0, 1)) + part(slice(1, 4)), part(slice(0, 4)), rtol=1e-5)


@pytest.mark.parametrize(
  ("terms", "says"),
  [
    ([{"kind": "kl"}], "kind"),
    ([{"kind": "cross_entropy", "temperature": 2.0}], "temperature"),
    ([{"kind": "hidden"}], "pairs"),
    ([{"kind": "jsd", "beta": 1.5}], "beta"),
    ([{"kind": "jsd", "beta": "half"}], "beta"),
    ([{"kind": "skew_kl", "alpha": 1.0}], "alpha"),
    ([{"kind": "alpha_beta", "alpha": 1.0, "beta": -1.0}], "must not be 0"),
    ([{"kind": "hidden", "pairs": "even"}], "'uniform' or {'last': k}"),
    ([{"kind": "hidden", "pairs": {"last": 2}}], "names a layer that is not there"),
    ([{"kind": "hidden", "pairs": "uniform", "balanced": True}], "no term of logits"),
    ([{"kind": "forward_kl"}, {"kind": "hidden", "pairs": "uniform", "balanced": 1}], "use True or False"),
    ([], "at least one"),
  ],
)
def test_wrong_terms_are_named(terms, says):
  with pytest.raises(InputError, match=says):
    build_terms(terms, key="config.stages.a.terms", steps=1, depths=(1, 3))
