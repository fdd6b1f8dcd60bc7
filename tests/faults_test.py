"""Faults that public distillation frameworks have had, and checks that detect them.

Each check passes on the code as it is, and fails once the fault is injected. Faults of whole runs have their own tests:
resuming bit-equal after a kill (tests/jobs/train_test.py), teachers over two processes and an export that fails
(tests/jobs/jobs_test.py), and a teacher with adapters for a student without (tests/jobs/routes_test.py).
"""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.errors import InputError
from distill.losses import chunked, divergences, token_losses
from distill.objectives import hidden, objective, pairs
from distill.objectives.term import LossContext, LossInputs
from distill.training import checkpoint
from distill.types import Batch, DenseSignal, ModelOutput, Readout
from tests.objectives.problem import bound

ROWS, T, D, V = 3, 8, 6, 11


def array(*shape, seed=0, scale=1.0):
  return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape) * scale, jnp.float32)


def batch(mask=None):
  """Returns three rows of two documents and two positions of padding; the last token of a document predicts nothing."""
  segments = jnp.asarray(np.repeat([[1, 2, 0]], [3, 3, 2], axis=1).repeat(ROWS, 0))
  weights = jnp.asarray(np.asarray([[1, 1, 0, 1, 1, 0, 0, 0]], np.float32).repeat(ROWS, 0))
  tokens = jnp.asarray(np.random.default_rng(1).integers(0, V, (ROWS, T)))
  return Batch(tokens=tokens, segments=segments, positions=segments, loss_mask=weights)


def readout(seed, *, width=D, vocab=V, padded=0, **settings):
  return Readout(kernel=array(width, vocab + padded, seed=seed), vocab_size=vocab, **settings)


def loss(spec, given, *, student=None, teacher=None, rows=slice(None), totals=None):
  """Returns the loss of one term on `rows`, divided by the counts in `totals`; by default by those of all rows."""
  terms = bound(spec, student=1, teacher=1)
  part = jax.tree.map(lambda x: x[rows], given)
  hidden, others = array(*given.tokens.shape, D), array(*given.tokens.shape, D, seed=3)
  inputs = LossInputs(
    batch=part,
    output=ModelOutput(hidden=hidden[rows], readout=student or readout(1)),
    signal=DenseSignal(hidden=others[rows], readout=teacher or readout(2)),
  )
  context = LossContext(step=jnp.zeros(()), steps=1, totals=totals or objective.counts(given), states={})
  return float(objective.loss_sums(terms, inputs, context=context)[0])


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def logits(hidden, head, *, bias=0.0, softcap=None, scale=1.0):
  found = scale * (np.asarray(hidden, np.float64) @ np.asarray(head.kernel, np.float64) + bias)
  return found if softcap is None else softcap * np.tanh(found / softcap)


def kl(p, q):
  return (p * np.log(p / q)).sum(-1)


def masked_positions_count_for_nothing():
  given = batch()
  p, q = (softmax(logits(array(ROWS, T, D, seed=s), readout(k))) for s, k in ((3, 2), (0, 1)))
  mask = np.asarray(given.loss_mask)
  np.testing.assert_allclose(loss({"kind": "forward_kl"}, given), (mask * kl(p, q)).sum() / mask.sum(), rtol=1e-5)


def labels_are_the_next_tokens():
  given = batch()
  q, mask = softmax(logits(array(ROWS, T, D), readout(1))), np.asarray(given.loss_mask)
  following = np.roll(np.asarray(given.tokens), -1, axis=1)
  right = -np.log(np.take_along_axis(q, following[..., None], -1)[..., 0])
  np.testing.assert_allclose(loss({"kind": "cross_entropy"}, given), (mask * right).sum() / mask.sum(), rtol=1e-5)


def projections_are_of_the_width_alone():
  kernel = array(D, 4)
  for length in (T, 5):
    x = array(ROWS, length, D)
    np.testing.assert_allclose(hidden.projected(x, kernel), x @ kernel, rtol=1e-5, atol=1e-6)


def small_divergences_survive_bfloat16():
  head = Readout(kernel=array(64, 300, seed=1).astype(jnp.bfloat16), vocab_size=300)
  student = array(20, 64).astype(jnp.bfloat16)
  teacher = (student.astype(jnp.float32) + array(20, 64, seed=5, scale=0.008)).astype(jnp.bfloat16)
  expected = kl(*(softmax(logits(x, head)) for x in (teacher, student))).sum()
  assert 1e-4 < expected / 20 < 4e-3
  found = chunked.chunked_divergence(
    divergences.forward_kl, hidden=student, readout=head, target=teacher, teacher_readout=head, mask=jnp.ones(20)
  )
  np.testing.assert_allclose(found, expected, rtol=0.01)


def a_beta_of_zero_is_forward_kl():
  given = batch()
  np.testing.assert_allclose(loss({"kind": "jsd", "beta": 0.0}, given), loss({"kind": "forward_kl"}, given), rtol=1e-6)
  np.testing.assert_allclose(loss({"kind": "jsd", "beta": 1.0}, given), loss({"kind": "reverse_kl"}, given), rtol=1e-6)


def distances_do_not_grow_with_the_width():
  narrow, wide = (
    float(jnp.mean(pairs.DISTANCES["mse"](array(50, width), array(50, width, seed=1)))) for width in (64, 4096)
  )
  np.testing.assert_allclose(narrow, wide, rtol=0.15)


def logits_of_all_tokens_never_exist():
  student, teacher = readout(1, width=16, vocab=4096), readout(2, width=16, vocab=4096)
  hidden = array(8192, 16)

  def value(hidden, student):
    return chunked.chunked_divergence(
      divergences.forward_kl, hidden=hidden, readout=student, target=hidden, teacher_readout=teacher, mask=hidden[:, 0]
    )

  compiled = jax.jit(jax.value_and_grad(value, argnums=(0, 1))).lower(hidden, student).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 8192 * 4096 * 4 * 2


def micro_batches_add_up():
  given = batch()
  uneven = Batch(
    tokens=given.tokens,
    segments=given.segments,
    positions=given.positions,
    loss_mask=given.loss_mask.at[0].set(0.0).at[1, 0].set(0.0),
  )
  totals = objective.counts(uneven)
  parts = [loss({"kind": "forward_kl"}, uneven, rows=slice(i, i + 1), totals=totals) for i in range(ROWS)]
  np.testing.assert_allclose(sum(parts), loss({"kind": "forward_kl"}, uneven), rtol=1e-5)


def heads_keep_their_softcap_scale_and_bias():
  given, settings = batch(), {"softcap": 2.0, "scale": 0.5}
  bias = array(V, seed=9)
  heads = [readout(seed, bias=bias, **settings) for seed in (1, 2)]
  q, p = (
    softmax(logits(array(ROWS, T, D, seed=seed), head, bias=np.asarray(bias), **settings))
    for seed, head in zip((0, 3), heads, strict=True)
  )
  mask = np.asarray(given.loss_mask)
  found = loss({"kind": "forward_kl"}, given, student=heads[0], teacher=heads[1])
  np.testing.assert_allclose(found, (mask * kl(p, q)).sum() / mask.sum(), rtol=1e-5)


def padding_of_a_vocabulary_has_no_probability():
  given, plain = batch(), readout(1)
  kernel = jnp.concatenate([plain.kernel, jnp.zeros((D, 5))], axis=1)
  padded = Readout(kernel=kernel, vocab_size=V)
  for kind in ("forward_kl", "cross_entropy"):
    np.testing.assert_allclose(loss({"kind": kind}, given, student=padded), loss({"kind": kind}, given), rtol=1e-6)


def vocabularies_may_be_padded_differently():
  given, mine, theirs = batch(), readout(1, vocab=V + 3), readout(2, vocab=V + 7)
  cut = [Readout(kernel=one.kernel[:, : V + 3], vocab_size=V + 3) for one in (mine, theirs)]
  expected = loss({"kind": "forward_kl"}, given, student=cut[0], teacher=cut[1])
  np.testing.assert_allclose(loss({"kind": "forward_kl"}, given, student=mine, teacher=theirs), expected, rtol=1e-6)


def fingerprints_are_the_same_in_every_process(digest="config.fingerprint(value)"):
  program = f"""
from distill.jobs import config
stage = {{"name": "a", "steps": 1, "terms": [{{"kind": "z_loss"}}]}}
value = config.resolve({{"data": {{"sources": []}}, "stages": [stage]}})
print({digest})
"""
  found = {
    subprocess.run(
      [sys.executable, "-c", program],
      env={**os.environ, "PYTHONHASHSEED": seed},
      check=True,
      capture_output=True,
      text=True,
    ).stdout
    for seed in ("1", "2")
  }
  assert len(found) == 1


def test_configuration_fingerprints_are_the_same_in_every_process_unlike_a_salted_hash():
  fingerprints_are_the_same_in_every_process()
  with pytest.raises(AssertionError):
    fingerprints_are_the_same_in_every_process("hash(str(value))")


def nothing_starts_from_scratch_where_there_are_checkpoints(directory):
  checkpoints = checkpoint.Checkpoints(directory)
  checkpoints.save(4, arrays={"params.x": jnp.ones(3)}, extra={"step": 4})
  checkpoints.close()
  for path in (directory / "4" / "arrays").rglob("*"):
    if path.is_file():
      path.write_bytes(b"")
  again = checkpoint.Checkpoints(directory)
  try:
    with pytest.raises(InputError):
      again.restore(lambda extra: {"params.x": jax.ShapeDtypeStruct((3,), jnp.float32)}, log=lambda line: None)
  finally:
    again.close()


def test_a_run_with_damaged_checkpoints_is_refused_instead_of_started_from_scratch(tmp_path, monkeypatch):
  nothing_starts_from_scratch_where_there_are_checkpoints(tmp_path / "right")
  monkeypatch.setattr(checkpoint.Checkpoints, "restore", lambda self, abstract, log: None)
  with pytest.raises(pytest.fail.Exception):
    nothing_starts_from_scratch_where_there_are_checkpoints(tmp_path / "wrong")


def wrapped(function, **changes):
  """Returns `function` with some of its keyword arguments changed: `changes` has a function for each name."""

  def changed(*arguments, **keywords):
    for name, change in changes.items():
      if name in keywords:
        keywords[name] = change(keywords[name])
    return function(*arguments, **keywords)

  return changed


def _all_count(patch):
  patch.setattr(objective, "chunked_losses", wrapped(objective.chunked_losses, mask=jnp.ones_like))


def _mean_over_everything(patch):
  patch.setattr(objective, "counts", lambda given: {"predicted": jnp.float32(given.tokens.size), "present": 1.0})


def _mask_off_by_one(patch):
  patch.setattr(objective, "chunked_losses", wrapped(objective.chunked_losses, mask=lambda mask: jnp.roll(mask, 1)))


def _labels_not_shifted(patch):
  def unshifted(labels):
    return jnp.roll(labels.reshape(-1, T), 1, axis=1).ravel()

  patch.setattr(objective, "chunked_losses", wrapped(objective.chunked_losses, labels=unshifted))


def _every_axis(patch):
  patch.setattr(hidden, "projected", lambda x, kernel: x.reshape(ROWS, -1) @ jnp.tile(kernel, (T, 1)))


def _logits_in_bfloat16(patch):
  right = Readout.logits
  # XLA leaves out a mere conversion there and back.
  patch.setattr(Readout, "logits", lambda self, hidden: jax.lax.reduce_precision(right(self, hidden), 8, 7))


def _the_other_direction(patch):
  right = divergences.jsd
  patch.setattr(divergences, "jsd", lambda p, q, *, beta: right(q, p, beta=beta))


def _summed_squares(patch):
  patch.setitem(pairs.DISTANCES, "mse", lambda student, teacher: jnp.sum(jnp.square(student - teacher), axis=-1))


def _all_at_once(patch):
  patch.setattr(chunked, "chunk_tokens", lambda vocab, *, tokens, width: tokens)


def _each_by_itself(patch):
  right = objective.loss_sums

  def alone(terms, inputs, *, context):
    return right(terms, inputs, context=dataclasses.replace(context, totals=objective.counts(inputs.batch)))

  patch.setattr(objective, "loss_sums", alone)


def _plain_product(**kept):
  def inject(patch):
    def product(self, hidden):
      found = jnp.matmul(hidden, self.kernel)
      found = found + self.bias[None, :] if kept.get("bias") else found
      found = found * self.scale if kept.get("scale") else found
      return self.softcap * jnp.tanh(found / self.softcap) if kept.get("softcap") else found

    patch.setattr(Readout, "logits", product)

  return inject


def _padding_of_zeros(patch):
  right = chunked._chunk_losses

  def losses(functions, shared, products, readout, tokens):
    whole = Readout(kernel=readout.kernel, vocab_size=readout.kernel.shape[1])
    return right(functions, shared, products, whole, tokens)

  patch.setattr(chunked, "_chunk_losses", losses)


def _same_width(patch):
  def whole(student, teacher, *, temperature):
    return teacher / temperature, student / temperature

  patch.setattr(token_losses, "shared_logits", whole)


FAULTS = {
  "masked positions move the KL": (masked_positions_count_for_nothing, _all_count),
  "means shrink with padding": (masked_positions_count_for_nothing, _mean_over_everything),
  "the mask is off by one": (masked_positions_count_for_nothing, _mask_off_by_one),
  "labels are not shifted": (labels_are_the_next_tokens, _labels_not_shifted),
  "a projection contracts every axis": (projections_are_of_the_width_alone, _every_axis),
  "logits are rounded to bfloat16": (small_divergences_survive_bfloat16, _logits_in_bfloat16),
  "beta weights the wrong distribution": (a_beta_of_zero_is_forward_kl, _the_other_direction),
  "a distance grows with the width": (distances_do_not_grow_with_the_width, _summed_squares),
  "logits of all tokens exist at once": (logits_of_all_tokens_never_exist, _all_at_once),
  "each micro-batch is divided by its own count": (micro_batches_add_up, _each_by_itself),
  "the softcap is forgotten": (heads_keep_their_softcap_scale_and_bias, _plain_product(bias=True, scale=True)),
  "the scale is forgotten": (heads_keep_their_softcap_scale_and_bias, _plain_product(bias=True, softcap=True)),
  "the bias is forgotten": (heads_keep_their_softcap_scale_and_bias, _plain_product(scale=True, softcap=True)),
  "padding of the vocabulary has logits of zero": (padding_of_a_vocabulary_has_no_probability, _padding_of_zeros),
  "vocabularies must be padded to one width": (vocabularies_may_be_padded_differently, _same_width),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_check_passes_without_its_injected_fault_and_fails_with_it(name, monkeypatch):
  check, inject = FAULTS[name]
  check()
  inject(monkeypatch)
  with pytest.raises((AssertionError, TypeError) if "one width" in name else AssertionError):
    check()
