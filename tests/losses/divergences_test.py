"""Compares values and gradients of every divergence, dense and sparse, with plain float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.losses import divergences
from distill.losses.chunked import chunked_losses
from distill.losses.token_losses import divergence_loss
from distill.types import Readout, SparseTarget

WIDTH = 6
_LARGE = [pytest.param((size, other), marks=pytest.mark.slow) for size, other in ((32_000, 32_000), (151_936, 152_064))]
VOCABULARIES = [(17, 17), (257, 257), (2050, 2050), *_LARGE]


def kl(p, q):
  return np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(q > 0, q, 1)), 0).sum(-1)


def ab(p, q, a, b):
  if b == 0:
    return (p**a * np.log(np.where(p > 0, p, 1) ** a / np.where(q > 0, q, 1) ** a) * (p > 0) - p**a + q**a).sum(
      -1
    ) / a**2
  return -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum(-1) / (a * b)


def dkd(p, q, labels, a, b):
  rows = np.arange(len(p))
  pt, qt = p[rows, labels], q[rows, labels]
  pr, qr = (np.where(np.arange(p.shape[1]) == labels[:, None], 0, x) for x in (p, q))
  binary = kl(np.stack([pt, pr.sum(-1)], -1), np.stack([qt, qr.sum(-1)], -1))
  return a * binary + b * kl(pr / pr.sum(-1, keepdims=True), qr / qr.sum(-1, keepdims=True))


def taid(p, q, q0, t):
  r = np.where(p > 0, q0 ** (1 - t) * p**t, 0)
  return kl(r / r.sum(-1, keepdims=True), q)


# name -> (ours, oracle(p, q, q held constant, labels), needs labels, allows buckets where p has no mass)
# Total variation has kinks that a difference quotient must not step over: its signs are held constant.
CASES = {
  "forward_kl": (divergences.forward_kl, lambda p, q, q0, y: kl(p, q), False, True),
  "reverse_kl": (divergences.reverse_kl, lambda p, q, q0, y: kl(q, p), False, False),
  **{
    f"jsd_{b}": (
      functools.partial(divergences.jsd, beta=b),
      lambda p, q, q0, y, b=b: b * kl(p, b * p + (1 - b) * q) + (1 - b) * kl(q, b * p + (1 - b) * q),
      False,
      True,
    )
    for b in (0.1, 0.5)
  },
  "jsd_0": (functools.partial(divergences.jsd, beta=0.0), lambda p, q, q0, y: kl(p, q), False, True),
  "jsd_1": (functools.partial(divergences.jsd, beta=1.0), lambda p, q, q0, y: kl(q, p), False, False),
  "skew": (
    functools.partial(divergences.skew_kl, alpha=0.1),
    lambda p, q, q0, y: kl(p, 0.1 * p + 0.9 * q),
    False,
    True,
  ),
  "skew_reverse": (
    functools.partial(divergences.skew_reverse_kl, alpha=0.1),
    lambda p, q, q0, y: kl(q, 0.1 * q + 0.9 * p),
    False,
    True,
  ),
  "total_variation": (
    divergences.total_variation,
    lambda p, q, q0, y: 0.5 * (np.sign(p - q0) * (p - q)).sum(-1),
    False,
    True,
  ),
  "alpha_beta": (
    functools.partial(divergences.alpha_beta, alpha=0.3, beta=0.6),
    lambda p, q, q0, y: ab(p, q, 0.3, 0.6),
    False,
    True,
  ),
  "alpha_only": (
    functools.partial(divergences.alpha_beta, alpha=1.0, beta=0.0),
    lambda p, q, q0, y: ab(p, q, 1.0, 0.0),
    False,
    True,
  ),
  "taid": (functools.partial(divergences.taid, t=0.4), lambda p, q, q0, y: taid(p, q, q0, 0.4), False, True),
  "dkd": (
    functools.partial(divergences.decoupled_kl, alpha=1.0, beta=2.0),
    lambda p, q, q0, y: dkd(p, q, y, 1.0, 2.0),
    True,
    True,
  ),
}


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


@functools.cache
def problem(vocab, kind, temperature):
  """Returns float64 (hidden, kernel, teacher hidden, teacher kernel, labels, mask, sparse target or None)."""
  rng, tokens = np.random.default_rng(vocab[0]), 5 if vocab[0] < 10_000 else 2
  hidden, theirs = rng.normal(size=(2, tokens, WIDTH))
  kernels = [rng.normal(size=(WIDTH, size)) for size in vocab]
  arrays = [np.asarray(x, np.float32).astype(np.float64) for x in (hidden, kernels[0], theirs, kernels[1])]
  mask = np.asarray([1, 0, 1, 1, 1][:tokens], np.float64)
  shared = min(vocab)
  p = softmax((arrays[2] @ arrays[3])[:, :shared] / temperature)
  labels = rng.integers(0, shared, tokens)
  labels[0] = p[0].argmax()
  if kind == "dense":
    return (*arrays, labels, mask, None)
  ids = np.full((tokens, 9), -1)
  if kind == "top":
    ids[:, :8] = np.argsort(-p, axis=-1)[:, :8]
    probs = np.take_along_axis(p, np.maximum(ids, 0), -1) * (ids >= 0)
    tail = 1 - probs.sum(-1)
  else:
    probs, tail = np.zeros((tokens, 9)), np.zeros(tokens)
    for row in range(tokens):
      found, counts = np.unique(rng.choice(shared, 6, p=p[row] / p[row].sum()), return_counts=True)
      ids[row, : len(found)], probs[row, : len(found)] = found, counts / 6
  return (*arrays, labels, mask, (ids, np.float64(np.float32(probs)), np.float64(np.float32(tail))))


def buckets(q, ids):
  """Returns the probabilities of `ids` and, last, that of all other ids together."""
  inside = np.take_along_axis(q, np.maximum(ids, 0), -1) * (ids >= 0)
  outside = q.copy()
  for row, found in enumerate(ids):
    outside[row, found[found >= 0]] = 0
  return np.concatenate([inside, outside.sum(-1, keepdims=True)], -1)


def oracle(cases, vocab, kind, temperature):
  """Returns name -> (sum over tokens, slopes along a direction of the hidden states and one of the kernel)."""
  hidden, kernel, theirs, their_kernel, labels, mask, sparse = problem(vocab, kind, temperature)
  shared = min(vocab)

  def student(moved_hidden, moved_kernel):
    q = softmax((moved_hidden @ moved_kernel)[:, : (shared if sparse is None else vocab[0])] / temperature)
    return q if sparse is None else buckets(q, sparse[0])

  if sparse is None:
    p, y = softmax((theirs @ their_kernel)[:, :shared] / temperature), labels
  else:
    ids, probs, tail = sparse
    p = np.concatenate([probs, tail[:, None]], -1)
    inside = ids == labels[:, None]
    y = np.where(inside.any(-1), inside.argmax(-1), ids.shape[1])
  rng = np.random.default_rng(5)
  directions = rng.normal(size=hidden.shape), rng.normal(size=kernel.shape)
  q0, step = student(hidden, kernel), 1e-4
  found = {name: [(mask * case[1](p, q0, q0, y)).sum(), []] for name, case in cases.items()}
  for which in (0, 1):
    slopes = dict.fromkeys(cases, 0.0)
    # Fourth order: its error is the rounding of float64, near 1e-10.
    for k, factor in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
      moved = [x + (k * step * directions[which] if i == which else 0) for i, x in enumerate((hidden, kernel))]
      q = student(*moved)
      for name, case in cases.items():
        slopes[name] += factor * (mask * case[1](p, q, q0, y)).sum() / (12 * step)
    for name, slope in slopes.items():
      found[name][1].append(slope)
  return found, directions


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("vocab", VOCABULARIES, ids=lambda v: str(v[0]))
@pytest.mark.parametrize("kind", ["dense", "top", "sampled"])
def test_divergences_and_their_gradients_equal_float64_numpy(kind, vocab, temperature):
  hidden, kernel, theirs, their_kernel, labels, mask, sparse = problem(vocab, kind, temperature)
  f32 = [jnp.asarray(x, jnp.float32) for x in (hidden, kernel, theirs, their_kernel, mask)]
  target, teacher = f32[2], Readout(kernel=f32[3], vocab_size=vocab[1])
  if sparse is not None:
    ids, probs, tail = sparse
    with np.errstate(divide="ignore"):
      logs = [jnp.asarray(np.log(x), jnp.float32) for x in (probs, tail)]
    target, teacher = SparseTarget(ids=jnp.asarray(ids, jnp.int32), log_probs=logs[0], tail=logs[1]), None
  wanted = {name: case for name, case in CASES.items() if kind != "sampled" or case[3]}

  @jax.jit
  def ours(hidden, kernel):
    def sums(hidden, kernel):
      return {
        name: chunked_losses(
          [divergence_loss(case[0], labelled=case[2], temperature=temperature)],
          hidden=hidden,
          readout=Readout(kernel=kernel, vocab_size=vocab[0]),
          target=target,
          teacher_readout=teacher,
          labels=jnp.asarray(labels, jnp.int32),
          mask=f32[4],
        )[0]
        for name, case in wanted.items()
      }

    return sums(hidden, kernel), jax.jacrev(sums, argnums=(0, 1))(hidden, kernel)

  values, gradients = ours(f32[0], f32[1])
  found, directions = oracle(wanted, vocab, kind, temperature)
  for name, (value, slopes) in found.items():
    np.testing.assert_allclose(values[name], value, rtol=1e-5, err_msg=name)
    for got, slope, direction in zip(gradients[name], slopes, directions, strict=True):
      scale = np.linalg.norm(np.asarray(got, np.float64)) * np.linalg.norm(direction) * direction.size**-0.5
      got_slope = np.sum(np.asarray(got, np.float64) * direction)
      np.testing.assert_allclose(got_slope, slope, atol=1e-5 * scale, rtol=1e-5, err_msg=name)


def test_kl_of_logits_is_finite_where_logits_are_the_lowest_float():
  logits = jnp.asarray([[0.0, 1.0, jnp.finfo(jnp.float32).min], [2.0, -3e38, jnp.finfo(jnp.float32).min]])
  student, teacher = logits[:1] / 0.5, logits[1:] / 0.5
  value, slope = jax.value_and_grad(lambda x: divergences.forward_kl_of_logits(teacher, x)[0])(student)
  q, p = (jax.nn.softmax(jnp.asarray(x)) for x in ([0.0, 2.0], [4.0, -1e9]))
  np.testing.assert_allclose(value, -jnp.log(q[0]), rtol=1e-6)
  np.testing.assert_allclose(slope, [[*(q - p), 0.0]], rtol=1e-6)


def test_gradients_of_logits_keep_their_precision_where_logits_are_large():
  random = np.random.default_rng(0)
  teacher = random.normal(size=(4, 300)).astype(np.float32) + np.float32(1000)
  student = teacher + random.normal(size=(4, 300)).astype(np.float32) * np.float32(0.01)
  p, q = (softmax(np.asarray(x, np.float64)) for x in (teacher, student))
  got = jax.grad(lambda x: divergences.forward_kl_of_logits(jnp.asarray(teacher), x).sum())(jnp.asarray(student))
  np.testing.assert_allclose(got, q - p, atol=1e-4 * np.abs(q - p).max())
