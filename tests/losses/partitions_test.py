import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.losses.divergences import LOG_ZERO, forward_kl
from distill.losses.partitions import bucket_log_probs, sparse_log_probs
from distill.losses.token_losses import dense_log_probs
from distill.types import SparseTarget


def test_dense_log_probs_cover_the_ids_that_both_vocabularies_have():
  rng = np.random.default_rng(0)
  student, teacher = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 7), (3, 5)))
  log_p, log_q = jax.jit(lambda *given: dense_log_probs(*given, temperature=2.0))(student, teacher)
  np.testing.assert_allclose(log_p, jax.nn.log_softmax(teacher / 2), rtol=1e-6)
  np.testing.assert_allclose(log_q, jax.nn.log_softmax(student[:, :5] / 2), rtol=1e-6)


@pytest.mark.parametrize("raised", [0.0, 12.0, -12.0], ids=["even", "small tail", "large tail"])
def test_log_probs_of_listed_ids_and_of_all_others_are_precise_in_value_and_gradient(raised):
  rng = np.random.default_rng(0)
  logits, ids = rng.normal(size=(4, 9)), np.asarray([[0, 3, -1], [8, 1, 2], [-1, -1, -1], [4, 5, 6]])
  # Unused entries have no weight, as in a divergence.
  weights = rng.normal(size=(4, 4)) * np.pad(ids >= 0, ((0, 0), (0, 1)), constant_values=True)
  for row, found in enumerate(ids):
    logits[row, found[found >= 0]] += raised
  logits = logits.astype(np.float32)

  def plain(logits):
    probs = jax.nn.softmax(logits, axis=-1)
    inside = jnp.any(jnp.arange(9)[None, :, None] == ids[:, None], axis=-1)
    chosen = jnp.where(ids >= 0, jnp.log(jnp.take_along_axis(probs, jnp.maximum(ids, 0), axis=-1)), LOG_ZERO)
    tail = jnp.log(jnp.sum(jnp.where(inside, 0.0, probs), axis=-1, keepdims=True))
    return jnp.concatenate([chosen, tail], axis=-1)

  def found(function, logits):
    loss = lambda x: (jnp.sum((out := function(x)) * weights), out)  # noqa: E731
    (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(logits)
    return out, gradient

  got = found(lambda x: bucket_log_probs(x, jnp.asarray(ids)), jnp.asarray(logits))
  with jax.enable_x64(True):
    expected = [np.asarray(one) for one in found(plain, jnp.asarray(logits, jnp.float64))]
  for one, other in zip(got, expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inside", [0.0, 0.3])
def test_target_ids_beyond_the_students_vocabulary_are_dropped(inside):
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

  def loss(logits):
    log_p, log_q = sparse_log_probs(logits, target, temperature=1.0)
    return jnp.sum(forward_kl(log_p, log_q)), (jnp.exp(log_p), jnp.exp(log_q))

  gradient, (p, q) = jax.jit(jax.grad(loss, has_aux=True))(logits)
  shared = probs[:, [0, 2]]
  expected = shared / np.maximum(shared.sum(-1, keepdims=True), 1e-30)
  np.testing.assert_allclose(p[:, [0, 2]], expected, rtol=1e-5)
  assert (p[:, [1, 3, 4]] == 0).all() and (q[:, [1, 3]] == 0).all()
  assert jnp.isfinite(gradient).all()
  if not inside:
    np.testing.assert_allclose(gradient[1], 0.0, atol=1e-6)
