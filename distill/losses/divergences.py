"""Divergences per token, in nats, between a teacher's distribution p and a student's distribution q.

Both distributions are over the same buckets, given as log-probabilities [C, buckets]. The buckets are the ids of the
vocabulary, or the ids of a sparse target and one bucket for the rest (see `partitions`), so that one formula serves
both. A bucket without probability has the log-probability `LOG_ZERO`. Unused buckets have it in both distributions.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# exp(LOG_ZERO) is exactly 0 in float32, and 0 * LOG_ZERO is 0, where 0 * -inf would be NaN.
LOG_ZERO = -1e4

# Below this log-ratio p and q differ so much that the form with expm1 would cancel; above it the plain form would.
_FAR = -1.0

LogProbs = Float[Array, "C buckets"]
Logits = Float[Array, "C buckets"]
PerToken = Float[Array, " C"]
PerTokenColumn = Float[Array, "C 1"]


@jax.custom_vjp
def forward_kl(log_p: LogProbs, log_q: LogProbs) -> PerToken:
  """Computes KL(p ‖ q) = Σ p log(p/q). It is 0 if p = q; a bucket with q = 0 adds about 10⁴ p.

  The computed summands are p log(p/q) − p + q. Their sum is the same, because p and q each sum to one. None of them is
  negative, so they cannot cancel each other, which would lose precision.
  """
  log_ratio = log_p - log_q
  near = jnp.exp(log_p) * (log_ratio + jnp.expm1(-jnp.maximum(log_ratio, _FAR)))
  far = jnp.exp(log_p) * (log_ratio - 1.0) + jnp.exp(log_q)
  return jnp.sum(jnp.where(log_ratio > _FAR, near, far), axis=-1)


def _kl_forward(log_p, log_q):
  return forward_kl(log_p, log_q), (log_p, log_q)


def _kl_backward(saved, cotangent):
  # Barrier: XLA would share the exponentials with the forward pass and keep four such arrays alive instead of two.
  log_p, log_q = jax.lax.optimization_barrier(saved)
  return cotangent[..., None] * jnp.exp(log_p) * (log_p - log_q), cotangent[..., None] * _excess(log_p, log_q)


def _excess(log_p, log_q):
  """Returns q − p, precise even where p and q are close. It is the gradient of KL(p ‖ q) in the logits of q."""
  log_ratio, p = log_p - log_q, jnp.exp(log_p)
  return jnp.where(log_ratio > _FAR, p * jnp.expm1(-jnp.maximum(log_ratio, _FAR)), jnp.exp(log_q) - p)


forward_kl.defvjp(_kl_forward, _kl_backward)


def log_normaliser_parts(logits: Logits) -> tuple[PerTokenColumn, PerTokenColumn]:
  """Returns (max logit, log Σ exp(logit − max logit)), whose sum is logsumexp(logits).

  To get log-probabilities, subtract first the one and then the other from the logits. Their sum as one number would be
  rounded to the precision of the max logit, which may be large.
  """
  max_logit = jnp.max(logits, axis=-1, keepdims=True)
  # Barrier: XLA would share `logits - max_logit` with the log-probabilities and keep another array [C, V] alive.
  exp_logits = jnp.exp(logits - jax.lax.optimization_barrier(max_logit))
  return max_logit, jnp.log(jnp.sum(exp_logits, axis=-1, keepdims=True))


@jax.custom_vjp
def forward_kl_of_logits(teacher: Logits, student: Logits) -> PerToken:
  """Computes `forward_kl` of two softmaxes over the same ids, differentiable in the student's logits only.

  The gradient is q − p. It needs neither a sum over the vocabulary nor a third array [C, V]. It is right even for
  probabilities q below exp(LOG_ZERO). `forward_kl` has no gradient there, because its inputs are cut off at LOG_ZERO.

  Args:
    teacher: The teacher's logits, divided by the temperature.
    student: The student's logits, divided by the temperature.
  """
  return _kl_of_logits_forward(teacher, student)[0]


def _kl_of_logits_forward(teacher, student):
  saved = [(logits, log_normaliser_parts(logits)) for logits in (teacher, student)]
  return forward_kl(*map(_log_probs, saved)), saved


def _log_probs(saved):
  logits, (max_logit, log_sum) = saved
  return jnp.maximum(logits - max_logit - log_sum, LOG_ZERO)


def _kl_of_logits_backward(saved, cotangent):
  # Barrier for the reason given in `_kl_backward`.
  log_p, log_q = map(_log_probs, jax.lax.optimization_barrier(saved))
  return None, cotangent[..., None] * _excess(log_p, log_q)


forward_kl_of_logits.defvjp(_kl_of_logits_forward, _kl_of_logits_backward)


def reverse_kl(log_p: LogProbs, log_q: LogProbs) -> PerToken:
  """Computes KL(q ‖ p) = Σ q log(q/p)."""
  return forward_kl(log_q, log_p)


def jsd(log_p: LogProbs, log_q: LogProbs, *, beta: float) -> PerToken:
  """Computes the generalised Jensen-Shannon divergence β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = βp + (1 − β)q.

  Args:
    log_p: The teacher's log-probabilities.
    log_q: The student's log-probabilities.
    beta: β, 0 to 1. The formula is 0 at both ends. There the result is its limit after division by β or 1 − β instead:
      0 gives the forward KL divergence, 1 the reverse one.

  References:
    Agarwal et al. 2023, 2306.13649.
  """
  if beta in (0.0, 1.0):
    return reverse_kl(log_p, log_q) if beta else forward_kl(log_p, log_q)
  log_m = jnp.logaddexp(log_p + jnp.log(beta), log_q + jnp.log1p(-beta))
  return beta * forward_kl(log_p, log_m) + (1.0 - beta) * forward_kl(log_q, log_m)


def skew_kl(log_p: LogProbs, log_q: LogProbs, *, alpha: float) -> PerToken:
  """Computes the skew KL divergence KL(p ‖ αp + (1 − α)q).

  Args:
    log_p: The teacher's log-probabilities.
    log_q: The student's log-probabilities.
    alpha: α, 0 ≤ α < 1.

  References:
    Ko et al. 2024 (DistiLLM), 2402.03898.
  """
  return forward_kl(log_p, jnp.logaddexp(log_p + jnp.log(alpha), log_q + jnp.log1p(-alpha)) if alpha else log_q)


def skew_reverse_kl(log_p: LogProbs, log_q: LogProbs, *, alpha: float) -> PerToken:
  """Computes the skew reverse KL divergence KL(q ‖ αq + (1 − α)p).

  Args: as `skew_kl`.
  """
  return skew_kl(log_q, log_p, alpha=alpha)


def total_variation(log_p: LogProbs, log_q: LogProbs) -> PerToken:
  """Computes ½ Σ |p − q|, between 0 and 1; 1 minus it is the expected acceptance rate of speculative decoding."""
  return 0.5 * jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1)


def alpha_beta(log_p: LogProbs, log_q: LogProbs, *, alpha: float, beta: float) -> PerToken:
  """Computes the α-β divergence −1/(αβ) Σ [p^α q^β − α/(α+β) p^(α+β) − β/(α+β) q^(α+β)].

  Args:
    log_p: The teacher's log-probabilities.
    log_q: The student's log-probabilities.
    alpha: α. At 0 the result is the limit for α → 0. (α, β) = (1, 0) gives the forward KL divergence.
    beta: β. At 0 the result is the limit for β → 0. (α, β) = (0, 1) gives the reverse one. α + β must not be 0.

  References:
    Cichocki et al. 2011; Wang et al. 2025 (ABKD), 2505.04560.
  """
  if beta == 0.0:
    x, y = alpha * log_p, alpha * log_q
    return jnp.sum(jnp.exp(x) * (x - y) - jnp.exp(x) + jnp.exp(y), axis=-1) / alpha**2
  if alpha == 0.0:
    return alpha_beta(log_q, log_p, alpha=beta, beta=0.0)
  both, log_ratio = alpha + beta, log_p - log_q
  mixed = jnp.exp(alpha * log_p + beta * log_q)
  far = mixed - alpha / both * jnp.exp(both * log_p) - beta / both * jnp.exp(both * log_q)
  y = jnp.maximum(log_ratio, _FAR)
  near = jnp.exp(both * log_p) * (jnp.expm1(-beta * y) - beta / both * jnp.expm1(-both * y))
  return -jnp.sum(jnp.where(log_ratio > _FAR, near, far), axis=-1) / (alpha * beta)


def taid(log_p: LogProbs, log_q: LogProbs, *, t: float | Float[Array, ""]) -> PerToken:
  """Computes KL(r ‖ q) with the interpolated teacher r ∝ q^(1 − t) p^t, through which no gradient flows.

  Args:
    log_p: The teacher's log-probabilities.
    log_q: The student's log-probabilities.
    t: Interpolation, 0 to 1; 1 gives the forward KL divergence.

  References:
    Shing et al. 2025 (TAID), 2501.16937.
  """
  log_r = jax.nn.log_softmax((1.0 - t) * jax.lax.stop_gradient(log_q) + t * log_p, axis=-1)
  return forward_kl(jnp.maximum(log_r, LOG_ZERO), log_q)


def decoupled_kl(log_p: LogProbs, log_q: LogProbs, labels: Int[Array, " C"], *, alpha: float, beta: float) -> PerToken:
  """Computes the decoupled KL divergence, α · KL_label + β · KL_others.

  KL_label compares two buckets, the label and all others together. KL_others compares the other buckets, after p and q
  are renormalised over them.

  Args:
    log_p: The teacher's log-probabilities.
    log_q: The student's log-probabilities.
    labels: The bucket that holds each token's label.
    alpha: α, the weight of KL_label.
    beta: β, the weight of KL_others.

  References:
    Zhao et al. 2022 (DKD), 2203.08679.
  """
  is_label = jax.nn.one_hot(labels, log_p.shape[-1], dtype=bool)
  p_label, q_label = (jnp.sum(jnp.where(is_label, x, 0.0), axis=-1, keepdims=True) for x in (log_p, log_q))
  p_others, q_others = (jnp.where(is_label, LOG_ZERO, x) for x in (log_p, log_q))
  p_rest, q_rest = (jax.nn.logsumexp(x, axis=-1, keepdims=True) for x in (p_others, q_others))
  binary = forward_kl(jnp.concatenate([p_label, p_rest], -1), jnp.concatenate([q_label, q_rest], -1))
  p_among, q_among = (
    jnp.where(x <= LOG_ZERO, LOG_ZERO, x - rest) for x, rest in ((p_others, p_rest), (q_others, q_rest))
  )
  return alpha * binary + beta * forward_kl(p_among, q_among)


Divergence = Callable[..., PerToken]

LOGIT_DIVERGENCES: Mapping[Divergence, Callable[[Logits, Logits], PerToken]] = {forward_kl: forward_kl_of_logits}
"""Maps a divergence of log-probabilities to the same divergence of logits (teacher, student), if that is cheaper."""
