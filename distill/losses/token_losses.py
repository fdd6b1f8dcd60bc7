"""Losses per token, computed from logits; `chunked_losses` sums them."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distill.losses.divergences import LOG_ZERO, LOGIT_DIVERGENCES, Divergence, log_normaliser_parts
from distill.losses.partitions import sparse_log_probs
from distill.types import SparseTarget

Scalar = float | Float[Array, ""]


@jax.custom_vjp
def cross_entropy(logits: Float[Array, "C V"], labels: Int[Array, " C"]) -> Float[Array, " C"]:
  """Computes −log softmax(logits)[label] per token, in nats.

  Args:
    logits: Logits over the vocabulary.
    labels: The id of each token's label.
  """
  return _cross_entropy_forward(logits, labels)[0]


def _cross_entropy_forward(logits, labels):
  max_logit, log_sum = log_normaliser_parts(logits)
  label_logit = jnp.take_along_axis(logits, labels[:, None], axis=-1)
  return (log_sum - (label_logit - max_logit))[:, 0], (logits, labels, max_logit, log_sum)


def _cross_entropy_backward(saved, cotangent):
  # Recomputes the exponentials from the logits, so that no second [C, V] array is saved.
  logits, labels, max_logit, log_sum = saved
  is_label = (jnp.arange(logits.shape[-1])[None, :] == labels[:, None]).astype(logits.dtype)
  return cotangent[:, None] * (jnp.exp(logits - max_logit - log_sum) - is_label), None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def squared_log_normaliser(logits: Float[Array, "C V"]) -> Float[Array, " C"]:
  """Computes logsumexp(logits)² per token. As a loss (z-loss), it keeps the softmax normaliser near one.

  References:
    Chowdhery et al. 2022 (PaLM), 2204.02311.
  """
  return jnp.square(jax.nn.logsumexp(logits, axis=-1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLoss:
  """A loss per token, and its weight in the total loss.

  Attributes:
    per_token: (student logits [C, V], teacher, labels [C], temperature, extra) -> [C]. `teacher` is the teacher's
      logits over its own vocabulary, a `SparseTarget`, or None.
    weight: Factor of this loss in the total.
    temperature: Divides logits in a divergence.
    extra: Further scalars, such as the t of TAID.
  """

  per_token: Callable[..., Float[Array, " C"]]
  weight: Scalar = 1.0
  temperature: Scalar = 1.0
  extra: tuple[Scalar, ...] = ()


def cross_entropy_loss(*, weight: Scalar = 1.0) -> TokenLoss:
  """Returns the cross-entropy of the student's logits with the labels, as a `TokenLoss`."""
  return TokenLoss(per_token=lambda logits, teacher, labels, *_: cross_entropy(logits, labels), weight=weight)


def z_loss(*, weight: Scalar = 1.0) -> TokenLoss:
  """Returns the squared logsumexp of the student's logits, as a `TokenLoss`."""
  return TokenLoss(per_token=lambda logits, *_: squared_log_normaliser(logits), weight=weight)


def shared_logits(
  student: Float[Array, "C V"], teacher: Float[Array, "C teacher_V"], *, temperature: float | Float[Array, ""]
) -> tuple[Float[Array, "C buckets"], Float[Array, "C buckets"]]:
  """Returns (teacher, student) logits of the ids that both vocabularies have, divided by the temperature.

  Args:
    student: Logits over the student's vocabulary.
    teacher: Logits over the teacher's vocabulary. An id that both vocabularies have must mean the same token in both.
    temperature: Divides the logits of both models.
  """
  shared = min(student.shape[-1], teacher.shape[-1])
  return teacher[:, :shared] / temperature, student[:, :shared] / temperature


def dense_log_probs(
  student: Float[Array, "C V"], teacher: Float[Array, "C teacher_V"], *, temperature: float | Float[Array, ""]
) -> tuple[Float[Array, "C buckets"], Float[Array, "C buckets"]]:
  """Returns (teacher, student) log-probabilities over the ids that both vocabularies have, renormalised over them.

  Args: as `shared_logits`.
  """
  logits = shared_logits(student, teacher, temperature=temperature)
  log_p, log_q = (jnp.maximum(jax.nn.log_softmax(x, axis=-1), LOG_ZERO) for x in logits)
  return log_p, log_q


def divergence_loss(
  divergence: Divergence,
  *,
  labelled: bool = False,
  weight: Scalar = 1.0,
  temperature: Scalar = 1.0,
  extra: tuple[Scalar, ...] = (),
) -> TokenLoss:
  """Returns a `TokenLoss` that measures a divergence between the teacher's and the student's distributions.

  The loss is not multiplied by the squared temperature; `weight` can include this factor.

  Args:
    divergence: A function (log_p, log_q, *extra) as in `divergences`, or (log_p, log_q, labels, *extra) if `labelled`.
    labelled: True if `divergence` takes labels: for each token, the index of its label on the last axis of log_p and
      log_q. With a sparse target that axis holds the target's ids and then the tail.
    weight: Factor of this loss in the total.
    temperature: Divides both logits; a sparse target must be made at the same temperature.
    extra: Further scalars for the divergence, which may change from step to step.
  """
  logit_divergence = LOGIT_DIVERGENCES.get(divergence)

  def per_token(logits, teacher, labels, temperature, extra):
    sparse = isinstance(teacher, SparseTarget)
    if logit_divergence and not sparse:
      return logit_divergence(*shared_logits(logits, teacher, temperature=temperature))
    log_p, log_q = (sparse_log_probs if sparse else dense_log_probs)(logits, teacher, temperature=temperature)
    if labelled:
      return divergence(log_p, log_q, _label_buckets(labels, teacher), *extra)
    return divergence(log_p, log_q, *extra)

  return TokenLoss(per_token=per_token, weight=weight, temperature=temperature, extra=extra)


def _label_buckets(labels, teacher):
  """Returns, for each token, the index of its label on the last axis of the log-probabilities.

  With dense logits the index is the label. With a sparse target it is the position of the label among the target's ids,
  or of the tail, the last entry, if the label is not among them.
  """
  if not isinstance(teacher, SparseTarget):
    return labels
  inside = teacher.ids == labels[:, None]
  return jnp.where(inside.any(-1), jnp.argmax(inside, axis=-1), teacher.ids.shape[-1])
