import jax
import jax.numpy as jnp
import numpy as np

from distill.losses.token_losses import cross_entropy, divergence_loss, squared_log_normaliser
from distill.types import SparseTarget


def test_cross_entropy_stays_precise_where_logits_are_large():
  logits = np.random.default_rng(0).normal(size=(4, 300)).astype(np.float32) + np.float32(1000)
  labels = np.asarray([1, 2, 3, 4])
  q = np.exp(np.asarray(logits, np.float64) - 1000)
  q /= q.sum(-1, keepdims=True)
  value, gradient = jax.value_and_grad(lambda x: cross_entropy(x, jnp.asarray(labels)).sum())(jnp.asarray(logits))
  np.testing.assert_allclose(value, -np.log(q[range(4), labels]).sum(), rtol=1e-6)
  np.testing.assert_allclose(gradient, q - np.eye(300)[labels], rtol=2e-6)


def test_the_z_loss_is_the_squared_logsumexp():
  logits = jnp.log(jnp.asarray([[1.0, 2.0, 5.0], [0.5, 0.25, 0.25]]))
  np.testing.assert_allclose(squared_log_normaliser(logits), [np.log(8.0) ** 2, 0.0], atol=1e-6)


def test_a_divergence_that_needs_labels_receives_the_index_of_each_labels_column_in_the_log_probs():
  seen = []

  def divergence(log_p, log_q, labels):
    seen.append(labels.tolist())
    return log_p[:, 0]

  loss, labels = divergence_loss(divergence, labelled=True), jnp.asarray([6, 2, 5])
  target = SparseTarget(
    ids=jnp.asarray([[6, 2], [6, 2], [6, -1]]), log_probs=jnp.full((3, 2), -1.0), tail=jnp.full(3, -1.0)
  )
  loss.per_token(jnp.zeros((3, 8)), jnp.zeros((3, 8)), labels, 1.0, ())
  loss.per_token(jnp.zeros((3, 8)), target, labels, 1.0, ())
  assert seen == [[6, 2, 5], [0, 1, 2]]
