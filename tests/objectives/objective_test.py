import dataclasses

import jax
import numpy as np

from distill.objectives.objective import (
  initial_states,
  loss_sums,
  needs_student,
  needs_teacher,
  next_states,
  student_capture,
  teacher_capture,
)
from distill.types import Capture
from tests.objectives.problem import bound, context, inputs, sums

TERMS = (
  {"kind": "forward_kl", "weight": 0.7, "temperature": 2.0},
  {"kind": "cross_entropy", "weight": 0.2},
  {"kind": "hidden", "weight": 0.5, "pairs": ((0, 2),)},
)


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def test_the_loss_is_the_weighted_sum_of_the_terms_means_over_valid_tokens():
  given = inputs(3)
  output, signal, batch = given.output, given.signal, given.batch
  total, parts = sums(bound(*TERMS), given)
  student, teacher = (np.asarray(x.readout.logits(x.hidden), np.float64) for x in (output, signal))
  mask = np.asarray(batch.loss_mask)
  p, q = softmax(teacher / 2), softmax(student / 2)
  kl = 4 * (mask * (p * np.log(p / q)).sum(-1)).sum() / mask.sum()
  labels = np.roll(np.asarray(batch.tokens), -1, axis=1)
  nll = -np.log(np.take_along_axis(softmax(student), labels[..., None], -1)[..., 0])
  ce = (mask * nll).sum() / mask.sum()
  present = np.asarray(batch.segments) > 0
  mapped = np.asarray(output.layers[0], np.float64) @ np.asarray(given.params["0_2.kernel"], np.float64)
  wanted = np.asarray(signal.layers[2], np.float64)
  far = ((mapped - wanted) ** 2).sum(-1) / (wanted**2).sum(-1)
  hidden = (present * far).sum() / present.sum()
  assert list(parts) == ["0_forward_kl", "1_cross_entropy", "2_hidden"]
  np.testing.assert_allclose(list(parts.values()), [kl, ce, hidden], rtol=1e-5)
  np.testing.assert_allclose(total, 0.7 * kl + 0.2 * ce + 0.5 * hidden, rtol=1e-5)


def test_losses_of_micro_batches_add_up_to_the_loss_of_the_batch():
  given, terms = inputs(4), bound(*TERMS)

  def part(rows):
    def cut(value, name):
      return dataclasses.replace(value, **{name: jax.tree.map(lambda x: x[rows], getattr(value, name))})

    output, signal = (cut(cut(value, "hidden"), "layers") for value in (given.output, given.signal))
    share = dataclasses.replace(given, batch=jax.tree.map(lambda x: x[rows], given.batch), output=output, signal=signal)
    return loss_sums(terms, share, context=context(given))[0]

  np.testing.assert_allclose(part(slice(0, 1)) + part(slice(1, 4)), part(slice(0, 4)), rtol=1e-5)


def test_a_balanced_term_is_scaled_to_the_logit_losses_of_the_previous_step():
  given = inputs(2)
  terms = bound({"kind": "forward_kl", "weight": 3.0}, {"kind": "z_loss"}, {**TERMS[2], "balanced": True})
  states = initial_states(terms)
  assert list(states) == ["2"]
  first, parts = sums(terms, given, states=states)
  kl, z, hidden = parts.values()
  np.testing.assert_allclose(first, 3.0 * kl + z + 0.5 * hidden, rtol=1e-6)
  states = next_states(terms, context=context(given, states=states), parts=parts)
  np.testing.assert_allclose(sums(terms, given, states=states)[0], 3.0 * kl + z + 0.5 * 3.0 * kl, rtol=1e-6)


def test_a_terms_weight_follows_its_schedule():
  terms = bound({"kind": "z_loss", "weight": {"kind": "linear", "start": 0.0, "end": 9.0}})
  (first, _), (fourth, parts) = sums(terms, inputs(1)), sums(terms, inputs(1), step=3)
  np.testing.assert_allclose([first, fourth], [0.0, 3.0 * parts["0_z_loss"]], rtol=1e-6)


def test_captures_of_an_objective_are_the_union_of_the_activations_that_its_terms_need():
  aligned = bound({"kind": "mixer_output", "pairs": ((0, 2),)}, {"kind": "block_output", "pairs": ((0, 0, 1),)})
  assert not needs_student(aligned) and needs_teacher(aligned)
  assert student_capture(aligned) == Capture()
  assert teacher_capture(aligned) == Capture(layers=(1, -1), mixers=(2,))
  end_to_end = bound({"kind": "hidden", "pairs": ((0, 2),)}, {"kind": "relations", "pairs": ((0, 1),)})
  assert needs_student(end_to_end)
  assert student_capture(end_to_end) == Capture(layers=(0,), qkv=(0,))
  assert teacher_capture(end_to_end) == Capture(layers=(2,), qkv=(1,))
  assert not needs_teacher(bound({"kind": "cross_entropy"}, {"kind": "z_loss"}))
