import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill.losses import chunked as module
from distill.losses.chunked import chunk_tokens, chunked_divergence, chunked_losses
from distill.losses.divergences import forward_kl
from distill.losses.token_losses import cross_entropy_loss, divergence_loss, z_loss
from distill.parallel.mesh import MeshConfig, batch_sharding, batch_shards, make_mesh, replicated
from distill.types import Readout


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


def assert_same_value_and_gradients(ours, expected, *args):
  """Asserts that two functions have the same value and the same gradients for their first two arguments."""
  (value, grads), (expected_value, expected_grads) = (
    jax.jit(jax.value_and_grad(function, argnums=(0, 1)))(*args) for function in (ours, expected)
  )
  np.testing.assert_allclose(value, expected_value, rtol=1e-5)
  assert_close_in_norm(grads, expected_grads)


def assert_close_in_norm(grads, expected):
  for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
    assert jnp.linalg.norm(got - want) <= 1e-5 * jnp.linalg.norm(want)


@pytest.mark.parametrize(("vocab", "temperature"), [(17, 1.0), (257, 2.0), (2050, 1.0), (32_000, 2.0)])
def test_chunked_losses_and_gradients_equal_the_plain_formula(vocab, temperature):
  args = (*problem(vocab, tokens=600 if vocab == 32_000 else 40, pad=(3, 9)), temperature)
  assert_same_value_and_gradients(chunked, plain, *args)


def test_chunked_divergence_of_equal_distributions_is_zero():
  hidden, readout, _, _, mask = problem(257)
  assert abs(float(chunked(hidden, readout, hidden, readout, mask))) < 1e-5


def test_masked_positions_and_appended_padding_do_not_change_the_chunked_loss():
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


def test_chunked_losses_need_far_less_temporary_memory_than_the_plain_formula():
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


def plain_nll(logits, labels):
  return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]


def plain_z(logits, labels):
  return jnp.square(jax.nn.logsumexp(logits, axis=-1))


@pytest.mark.parametrize(
  ("loss", "plain_loss", "vocab"), [(cross_entropy_loss(), plain_nll, 2050), (z_loss(), plain_z, 17)]
)
def test_chunked_cross_entropy_and_z_loss_equal_the_formula_on_all_logits(loss, plain_loss, vocab):
  hidden, readout, _, _, mask = problem(vocab, tokens=600, pad=(3, 0))
  labels = jnp.asarray(np.random.default_rng(2).integers(0, vocab, 600))

  def expected(hidden, readout):
    return jnp.sum(mask * plain_loss(readout.logits(hidden)[:, :vocab], labels))

  def ours(hidden, readout):
    return chunked_losses([loss], hidden=hidden, readout=readout, labels=labels, mask=mask)[0]

  assert_same_value_and_gradients(ours, expected, hidden, readout)


def test_the_total_of_several_losses_is_their_weighted_sum():
  hidden, readout, teacher_hidden, teacher_readout, mask = problem(257, tokens=90, pad=(3, 9))
  labels = jnp.asarray(np.random.default_rng(2).integers(0, 257, 90))
  losses = [
    divergence_loss(forward_kl, weight=0.3, temperature=2.0),
    cross_entropy_loss(weight=0.5),
    z_loss(weight=0.01),
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
  single = [grad(hidden, readout, [loss]) for loss in losses]
  np.testing.assert_allclose(total, sum(one[0][0] for one in single), rtol=1e-5)
  np.testing.assert_allclose(sums, [one[0][1][0] for one in single], rtol=1e-5)
  whole = jax.tree.map(lambda *parts: sum(parts), *(one[1] for one in single))
  assert_close_in_norm(grads, whole)


COLLECTIVE = r"= (\(?\w+\[.*?) (?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\("


def collectives_in_loops(text):
  """Returns the result shapes of all collectives inside loops of a compiled program, as lists of dimensions."""
  computations = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
  bodies = re.findall(r"body=%?([\w.\-]+)", text)
  assert bodies
  results = [one for body in bodies for one in re.findall(COLLECTIVE, computations[body])]
  return [list(map(int, shape.split(","))) for one in results for shape in re.findall(r"\[([\d,]+)\]", one)]


@pytest.mark.parametrize("mesh_config", [MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)], ids=str)
def test_shards_sum_gradients_and_gather_the_output_head_outside_the_loop_over_chunks(monkeypatch, mesh_config):
  monkeypatch.setattr(module, "chunk_tokens", lambda vocab, *, tokens, width: 50)
  mesh = make_mesh(mesh_config)
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
  # A sharded vocabulary needs sums over it and hidden gradients for a chunk's tokens; a whole one needs nothing.
  assert all(math.prod(dimensions) <= 50 * 16 for dimensions in collectives_in_loops(text))
  assert bool(collectives_in_loops(text)) == (mesh.shape["tensor"] > 1)


@pytest.mark.parametrize(("tokens", "shards"), [(600, 4), (601, 4), (64, 8), (8, 8)])
def test_the_number_of_shards_does_not_change_the_loss(tokens, shards):
  assert_same_value_and_gradients(functools.partial(chunked, shards=shards), plain, *problem(2050, tokens=tokens))


def test_chunked_divergence_equals_chunked_losses_of_the_same_divergence_at_temperature_one():
  hidden, readout, teacher_hidden, teacher_readout, mask = problem(17)
  given = dict(hidden=hidden, readout=readout, target=teacher_hidden, teacher_readout=teacher_readout, mask=mask)
  np.testing.assert_array_equal(
    chunked_divergence(forward_kl, **given), chunked(hidden, readout, teacher_hidden, teacher_readout, mask)
  )


def test_a_bfloat16_output_head_has_finite_gradients_on_several_devices():
  hidden, readout, _, _, mask = problem(304)
  readout = dataclasses.replace(readout, kernel=readout.kernel.astype(jnp.bfloat16))
  labels = jnp.zeros(len(mask), jnp.int32)

  @jax.jit
  def total(readout):
    return chunked_losses([cross_entropy_loss()], hidden=hidden, readout=readout, labels=labels, mask=mask)[0]

  grads = jax.grad(total)(readout)
  assert grads.kernel.dtype == jnp.bfloat16 and jnp.isfinite(grads.kernel).all()


@pytest.mark.parametrize(
  ("vocab", "tokens", "width", "expected"),
  [(32_768, 100, 0, 100), (32_768, 4096, 0, 128), (2048, 4096, 0, 1024), (32_768, 4096, 1024, 448)],
)
def test_chunks_hold_eight_mib_of_logits_but_no_fewer_tokens_than_the_minimum_for_the_model_width(
  vocab, tokens, width, expected
):
  assert chunk_tokens(vocab, tokens=tokens, width=width) == expected
