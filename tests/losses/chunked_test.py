import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill.losses import chunked as module
from distill.losses.chunked import chunked_losses, cross_entropy_loss, divergence_loss, normaliser_loss, sparse_pair
from distill.losses.divergences import forward_kl
from distill.parallel.mesh import batch_sharding, batch_shards, make_mesh, replicated
from distill.types import Readout, SparseTarget


def problem(vocab, *, tokens=40, width=16, pad=(0, 0), seed=0):
  rng = np.random.default_rng(seed)

  def array(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  student = Readout(kernel=array(width, vocab + pad[0]), bias=array(vocab + pad[0]), softcap=5.0, vocab_size=vocab)
  teacher = Readout(kernel=array(width + 4, vocab + pad[1]) * 0.5, vocab_size=vocab)
  mask = jnp.asarray(rng.random(tokens) > 0.3, jnp.float32)
  return array(tokens, width), student, array(tokens, width + 4), teacher, mask


def chunked(hidden, readout, teacher_hidden, teacher_readout, mask, temperature=1.0, shards=1):
  return chunked_losses(
    [divergence_loss(forward_kl, temperature=temperature)],
    hidden=hidden,
    readout=readout,
    target=teacher_hidden,
    teacher_readout=teacher_readout,
    mask=mask,
    shards=shards,
  )[0]


def plain(hidden, readout, teacher_hidden, teacher_readout, mask, temperature=1.0):
  vocab = readout.vocab_size
  logits = readout.logits(hidden), teacher_readout.logits(teacher_hidden)
  q, p = (jax.nn.log_softmax(x[:, :vocab] / temperature) for x in logits)
  return jnp.sum(mask * jnp.sum(jnp.exp(p) * (p - q), axis=-1))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("vocab", [17, 257, 2050, 32_000])
def test_value_and_gradients_equal_the_plain_formula(vocab, temperature):
  args = (*problem(vocab, tokens=600 if vocab == 32_000 else 40, pad=(3, 9)), temperature)
  value, grads = jax.value_and_grad(chunked, argnums=(0, 1))(*args)
  expected, expected_grads = jax.value_and_grad(plain, argnums=(0, 1))(*args)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
    assert jnp.linalg.norm(got - want) <= 1e-5 * jnp.linalg.norm(want)


def test_equal_distributions_have_no_divergence():
  hidden, readout, _, _, mask = problem(257)
  assert abs(float(chunked(hidden, readout, hidden, readout, mask))) < 1e-5


@pytest.mark.parametrize("inside", [0.0, 0.3])
def test_kept_tokens_past_the_students_vocabulary_are_left_out(inside):
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.normal(size=(2, 20)), jnp.float32)
  ids, probs = np.asarray([[3, 25, 7, 21]] * 2), np.asarray([[0.5, 0.2, 0.2, 0.1], [0.5, 0.2, 0.2, 0.1]])
  probs[1, [0, 2]] *= inside
  probs[1, [1, 3]] /= probs[1].sum() / 1.0
  tail = np.asarray([0.0, 0.0])
  with np.errstate(divide="ignore"):
    target = SparseTarget(
      ids=jnp.asarray(ids), log_probs=jnp.log(jnp.asarray(probs, jnp.float32)), tail=jnp.log(jnp.asarray(tail))
    )
  p, q = sparse_pair(logits, target, temperature=1.0)
  kept = probs[:, [0, 2]]
  expected = kept / np.maximum(kept.sum(-1, keepdims=True), 1e-30)
  np.testing.assert_allclose(np.exp(p)[:, [0, 2]], expected, rtol=1e-5)
  assert (np.exp(p)[:, [1, 3, 4]] == 0).all() and (np.exp(q)[:, [1, 3]] == 0).all()
  gradient = jax.grad(lambda x: jnp.sum(forward_kl(*sparse_pair(x, target, temperature=1.0))))(logits)
  assert jnp.isfinite(gradient).all()
  if not inside:
    np.testing.assert_allclose(gradient[1], 0.0, atol=1e-6)


def test_masked_positions_and_appended_padding_change_nothing():
  hidden, readout, teacher_hidden, teacher_readout, mask = problem(257)
  rest = (teacher_readout, mask)
  value = chunked(hidden, readout, teacher_hidden, *rest)
  noise = jnp.where(mask[:, None] > 0, 0.0, 1e3)
  assert chunked(hidden + noise, readout, teacher_hidden - noise[:, :1], *rest) == value
  more = jnp.ones((23, 1))
  padded = chunked(
    jnp.concatenate([hidden, more * hidden[:1]]),
    readout,
    jnp.concatenate([teacher_hidden, more * teacher_hidden[:1]]),
    teacher_readout,
    jnp.concatenate([mask, jnp.zeros(23)]),
  )
  np.testing.assert_allclose(padded, value, rtol=1e-6)


def test_compiled_temporaries_stay_far_below_the_plain_loss():
  def temporaries(loss, tokens=8 * 512):
    def of_kernels(hidden, kernel, teacher_hidden, teacher_kernel, mask):
      readout, teacher = (Readout(kernel=one, vocab_size=32_768) for one in (kernel, teacher_kernel))
      return loss(hidden, readout, teacher_hidden, teacher, mask)

    shapes = [(tokens, 256), (256, 32_768), (tokens, 256), (256, 32_768), (tokens,)]
    step = jax.jit(jax.value_and_grad(of_kernels, argnums=(0, 1)))
    lowered = step.lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    return lowered.compile().memory_analysis().temp_size_in_bytes / 2**20

  ours, whole = temporaries(chunked), temporaries(plain)
  assert ours <= 300, ours
  assert whole >= 8 * ours, (whole, ours)
  assert temporaries(chunked, tokens=16 * 512) <= 1.01 * ours
  print(f"temporaries at [8,512] x 32,768: chunked {ours:.0f} MiB, plain {whole:.0f} MiB")


@pytest.mark.parametrize("vocab", [17, 2050])
def test_cross_entropy_equals_the_plain_formula(vocab):
  hidden, readout, _, _, mask = problem(vocab, tokens=600, pad=(3, 0))
  labels = jnp.asarray(np.random.default_rng(2).integers(0, vocab, 600))

  def plain_nll(hidden, readout):
    logs = jax.nn.log_softmax(readout.logits(hidden)[:, :vocab])
    return -jnp.sum(mask * jnp.take_along_axis(logs, labels[:, None], axis=-1)[:, 0])

  def ours(hidden, readout):
    return chunked_losses([cross_entropy_loss()], hidden=hidden, readout=readout, labels=labels, mask=mask)[0]

  value, grads = jax.value_and_grad(ours, argnums=(0, 1))(hidden, readout)
  expected, expected_grads = jax.value_and_grad(plain_nll, argnums=(0, 1))(hidden, readout)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
    assert jnp.linalg.norm(got - want) <= 1e-5 * jnp.linalg.norm(want)


def test_z_loss_equals_the_plain_formula():
  hidden, readout, _, _, mask = problem(257, pad=(3, 0))

  def plain_z(hidden, readout):
    return jnp.sum(mask * jnp.square(jax.nn.logsumexp(readout.logits(hidden)[:, :257], axis=-1)))

  def ours(hidden, readout):
    return chunked_losses([normaliser_loss()], hidden=hidden, readout=readout, mask=mask)[0]

  value, grads = jax.value_and_grad(ours, argnums=(0, 1))(hidden, readout)
  expected, expected_grads = jax.value_and_grad(plain_z, argnums=(0, 1))(hidden, readout)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
    assert jnp.linalg.norm(got - want) <= 1e-5 * jnp.linalg.norm(want)


def test_losses_that_share_a_walk_add_up_with_their_weights():
  hidden, readout, teacher_hidden, teacher_readout, mask = problem(257, tokens=90, pad=(3, 9))
  labels = jnp.asarray(np.random.default_rng(2).integers(0, 257, 90))
  losses = [
    divergence_loss(forward_kl, weight=0.3, temperature=2.0),
    cross_entropy_loss(weight=0.5),
    normaliser_loss(weight=0.01),
    divergence_loss(forward_kl, weight=0.2),
  ]

  def value(hidden, readout, losses):
    return chunked_losses(
      losses,
      hidden=hidden,
      readout=readout,
      target=teacher_hidden,
      teacher_readout=teacher_readout,
      labels=labels,
      mask=mask,
    )

  grad = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)
  (total, sums), grads = grad(hidden, readout, losses)
  apart = [grad(hidden, readout, [loss]) for loss in losses]
  np.testing.assert_allclose(total, sum(one[0][0] for one in apart), rtol=1e-5)
  np.testing.assert_allclose(sums, [one[0][1][0] for one in apart], rtol=1e-5)
  whole = jax.tree.map(lambda *parts: sum(parts), *(one[1] for one in apart))
  for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(whole), strict=True):
    assert jnp.linalg.norm(got - want) <= 1e-5 * jnp.linalg.norm(want)


COLLECTIVE = r"= (\(?\w+\[.*?) (?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\("


def in_loops(text):
  """Shapes of what collectives in the loops of a compiled program give, as lists of dimensions."""
  computations = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
  bodies = re.findall(r"body=%?([\w.\-]+)", text)
  assert bodies
  results = [one for body in bodies for one in re.findall(COLLECTIVE, computations[body])]
  return [list(map(int, shape.split(","))) for one in results for shape in re.findall(r"\[([\d,]+)\]", one)]


@pytest.mark.parametrize("shape", [(-1, 1, 1), (2, 2, 2)])
def test_shards_add_up_their_gradients_and_fetch_their_heads_once(monkeypatch, shape):
  monkeypatch.setattr(module, "chunk_tokens", lambda vocab, *, tokens, width: 50)
  mesh = make_mesh(shape)
  shards = batch_shards(mesh)
  hidden, readout, teacher_hidden, teacher_readout, mask = problem(2048, tokens=shards * 300)
  rows, head = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))

  def loss(hidden, kernel, teacher_hidden, teacher_kernel, mask):
    ours, theirs = (
      dataclasses.replace(one, kernel=x, bias=None) for one, x in ((readout, kernel), (teacher_readout, teacher_kernel))
    )
    return chunked(hidden, ours, teacher_hidden, theirs, mask, shards=shards)

  step = jax.jit(
    jax.value_and_grad(loss, argnums=(0, 1)),
    in_shardings=(rows, head, rows, head, rows),
    out_shardings=(replicated(mesh), (rows, head)),
  )
  text = step.lower(hidden, readout.kernel, teacher_hidden, teacher_readout.kernel, mask).compile().as_text()
  assert shards > 1 and re.search(COLLECTIVE, text)
  # Over a vocabulary in parts, numbers and hidden gradients of a chunk's tokens; nothing where each has all of it.
  assert all(math.prod(dimensions) <= 50 * 16 for dimensions in in_loops(text))
  assert bool(in_loops(text)) == (mesh.shape["tensor"] > 1)


@pytest.mark.parametrize(("tokens", "shards"), [(600, 4), (601, 4), (64, 8), (8, 8)])
def test_tokens_spread_over_shards_give_the_same(tokens, shards):
  args = problem(2050, tokens=tokens)
  value, grads = jax.value_and_grad(lambda *a: chunked(*a, shards=shards), argnums=(0, 1))(*args)
  expected, expected_grads = jax.value_and_grad(plain, argnums=(0, 1))(*args)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
    assert jnp.linalg.norm(got - want) <= 1e-5 * jnp.linalg.norm(want)
