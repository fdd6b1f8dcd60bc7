"""Log-probabilities of teacher and student over the buckets of a sparse teacher distribution."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distill.losses.divergences import LOG_ZERO
from distill.types import SparseTarget


def sparse_log_probs(
  student: Float[Array, "C V"], target: SparseTarget, *, temperature: float | Float[Array, ""]
) -> tuple[Float[Array, "C buckets"], Float[Array, "C buckets"]]:
  """Returns (teacher, student) log-probabilities, [C, k+1] each: of the target's k ids, then of all others together.

  The student's log-probabilities come from the softmax over its whole vocabulary. Target ids beyond the student's
  vocabulary are dropped, and the teacher's distribution is renormalised over the rest. If no probability is left, all
  of the teacher's log-probabilities are `LOG_ZERO`.

  Args:
    student: Logits over the student's vocabulary.
    target: The teacher's distribution at the same temperature.
    temperature: Divides the student's logits.
  """
  ids = jnp.where(target.ids < student.shape[-1], target.ids, -1)
  log_p = jnp.concatenate([jnp.where(ids >= 0, target.log_probs, LOG_ZERO), target.tail[:, None]], axis=-1)
  log_p = jnp.maximum(log_p, LOG_ZERO)
  dropped = jnp.any(ids != target.ids, axis=-1, keepdims=True)
  remaining = jnp.where(dropped, jax.nn.logsumexp(log_p, axis=-1, keepdims=True), 0.0)
  log_p = jnp.where(remaining > LOG_ZERO / 2, jnp.maximum(log_p - remaining, LOG_ZERO), LOG_ZERO)
  return log_p, bucket_log_probs(student / temperature, ids)


@jax.custom_vjp
def bucket_log_probs(logits: Float[Array, "C V"], ids: Int[Array, "C k"]) -> Float[Array, "C k+1"]:
  """Returns the log-probabilities of `ids` and, in the last column, that of all other ids together.

  Args:
    logits: Logits over the vocabulary.
    ids: Distinct ids of each token; -1 marks an unused entry, which gets `LOG_ZERO`. The gradient assumes that the
      loss does not depend on unused entries.
  """
  return _buckets_forward(logits, ids)[0]


def _without_ids(logits, ids):
  """Returns `logits` with the logits of `ids` set to -inf; an id of -1 is ignored."""
  rows = jnp.arange(logits.shape[0])[:, None]
  return logits.at[rows, jnp.where(ids >= 0, ids, logits.shape[-1])].set(-jnp.inf, mode="drop")


def _buckets_forward(logits, ids):
  normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  support = jnp.take_along_axis(logits, jnp.maximum(ids, 0), axis=-1) - normaliser
  support = jnp.maximum(jnp.where(ids >= 0, support, LOG_ZERO), LOG_ZERO)
  inside = jnp.sum(jnp.exp(support), axis=-1, keepdims=True)
  # Each form is used where the other cancels: a small tail is summed, a small support is subtracted from one.
  summed = jax.nn.logsumexp(_without_ids(logits, ids), axis=-1, keepdims=True) - normaliser
  tail = jnp.where(inside < 0.5, jnp.log1p(-jnp.minimum(inside, 0.5)), jnp.maximum(summed, LOG_ZERO))
  return jnp.concatenate([support, tail], axis=-1), (logits, ids, normaliser, support, inside, tail)


def _buckets_backward(saved, cotangent):
  logits, ids, normaliser, support, inside, tail = saved
  support_grad, tail_grad = cotangent[:, :-1], cotangent[:, -1:]
  total = jnp.sum(support_grad, axis=-1, keepdims=True)
  # tail_grad / tail − (sum of all cotangents), over one denominator: the two terms nearly cancel when the tail is
  # nearly all of the mass.
  factor = tail_grad * inside - jnp.exp(tail) * total
  gradient = factor * jnp.exp(_without_ids(logits, ids) - normaliser - tail)
  rows = jnp.arange(logits.shape[0])[:, None]
  at_ids = support_grad - jnp.exp(support) * (total + tail_grad)
  return gradient.at[rows, jnp.where(ids >= 0, ids, logits.shape[-1])].set(at_ids, mode="drop"), None


bucket_log_probs.defvjp(_buckets_forward, _buckets_backward)
