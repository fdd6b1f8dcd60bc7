"""Divergences between teacher p and student q, per token, in nats, over any partition of the vocabulary.

A partition is the vocabulary itself (dense) or a support and the tail (sparse): every function takes log-probabilities
[M, K] of the same K buckets on both sides, so that the two cases are one formula. A bucket without mass has `NOTHING`
as its logarithm, on the teacher's side or, for an unused place of a support, on both.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# exp(NOTHING) is exactly 0 in float32, and 0 * NOTHING is 0 where 0 * -inf would not be a number.
NOTHING = -1e4

# Where log(p/q) is below this, p and q differ so much that expm1 of it would be what cancels.
_FAR = -1.0

LogProbs = Float[Array, "M K"]
Logits = Float[Array, "M K"]
PerToken = Float[Array, " M"]
Normaliser = Float[Array, "M 1"]


@jax.custom_vjp
def forward_kl(p: LogProbs, q: LogProbs) -> PerToken:
  """KL(p ‖ q): 0 when equal, and infinite (about 10⁴ times the mass) where q has none.

  Summed as p log(p/q) − p + q, the same since both sum to one: no summand is negative, so that nothing cancels.
  """
  x = p - q
  near = jnp.exp(p) * (x + jnp.expm1(-jnp.maximum(x, _FAR)))
  return jnp.sum(jnp.where(x > _FAR, near, jnp.exp(p) * (x - 1.0) + jnp.exp(q)), axis=-1)


def _kl_forward(p, q):
  return forward_kl(p, q), (p, q)


def _kl_backward(saved, cotangent):
  # Made again from p and q: shared with the value, the exponentials would stay in memory, four times [M, K] in place of
  # two.
  p, q = jax.lax.optimization_barrier(saved)
  return cotangent[..., None] * jnp.exp(p) * (p - q), cotangent[..., None] * _excess(p, q)


def _excess(p, q):
  """exp(q) − exp(p), precise where they are close: the slope of KL(p ‖ q) in q, and in logits that q comes from."""
  x, mass = p - q, jnp.exp(p)
  return jnp.where(x > _FAR, mass * jnp.expm1(-jnp.maximum(x, _FAR)), jnp.exp(q) - mass)


forward_kl.defvjp(_kl_forward, _kl_backward)


def normalisers(logits: Logits) -> tuple[Normaliser, Normaliser]:
  """What is taken from logits, first one and then the other, to make them log-probabilities: the largest, log Σ exp.

  As one number, logsumexp, they would be rounded to the size of the largest.
  """
  most = jnp.max(logits, axis=-1, keepdims=True)
  # Without a barrier logits − most, which log-probabilities begin with as well, would stay in memory for them.
  raised = jnp.exp(logits - jax.lax.optimization_barrier(most))
  return most, jnp.log(jnp.sum(raised, axis=-1, keepdims=True))


@jax.custom_vjp
def forward_kl_of_logits(teacher: Logits, student: Logits) -> PerToken:
  """`forward_kl` of two softmaxes over the same ids, with a slope in the student's logits alone.

  The slope, the student's less the teacher's probability, needs neither a sum over the vocabulary nor an array of its
  size beside the logits. It holds as well where the student's probability is below exp(NOTHING), where `forward_kl` is
  flat.
  """
  return _kl_of_logits_forward(teacher, student)[0]


def _kl_of_logits_forward(teacher, student):
  saved = [(x, normalisers(x)) for x in (teacher, student)]
  return forward_kl(*map(_log_probs, saved)), saved


def _log_probs(saved):
  logits, (most, log_sum) = saved
  return jnp.maximum(logits - most - log_sum, NOTHING)


def _kl_of_logits_backward(saved, cotangent):
  # Behind a barrier for the reason of `_kl_backward`.
  p, q = map(_log_probs, jax.lax.optimization_barrier(saved))
  return None, cotangent[..., None] * _excess(p, q)


forward_kl_of_logits.defvjp(_kl_of_logits_forward, _kl_of_logits_backward)


def reverse_kl(p: LogProbs, q: LogProbs) -> PerToken:
  """KL(q ‖ p)."""
  return forward_kl(q, p)


def jsd(p: LogProbs, q: LogProbs, *, beta: float) -> PerToken:
  """β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = βp + (1 − β)q; β = 0 is forward, β = 1 reverse KL (2306.13649)."""
  if beta in (0.0, 1.0):
    return reverse_kl(p, q) if beta else forward_kl(p, q)
  m = jnp.logaddexp(p + jnp.log(beta), q + jnp.log1p(-beta))
  return beta * forward_kl(p, m) + (1.0 - beta) * forward_kl(q, m)


def skew_kl(p: LogProbs, q: LogProbs, *, alpha: float) -> PerToken:
  """KL(p ‖ αp + (1 − α)q), 0 ≤ α < 1 (DistiLLM, 2402.03898)."""
  return forward_kl(p, jnp.logaddexp(p + jnp.log(alpha), q + jnp.log1p(-alpha)) if alpha else q)


def skew_reverse_kl(p: LogProbs, q: LogProbs, *, alpha: float) -> PerToken:
  """KL(q ‖ αq + (1 − α)p), 0 ≤ α < 1."""
  return skew_kl(q, p, alpha=alpha)


def total_variation(p: LogProbs, q: LogProbs) -> PerToken:
  """½ Σ |p − q|, between 0 and 1; 1 minus it is the expected acceptance of speculative decoding."""
  return 0.5 * jnp.sum(jnp.abs(jnp.exp(p) - jnp.exp(q)), axis=-1)


def alpha_beta(p: LogProbs, q: LogProbs, *, alpha: float, beta: float) -> PerToken:
  """The α-β divergence; (1, 0) is forward, (0, 1) reverse KL (Cichocki et al. 2011; ABKD, 2505.04560).

  −1/(αβ) Σ [p^α q^β − α/(α+β) p^(α+β) − β/(α+β) q^(α+β)], and its limits where α or β is 0; α + β must not be.
  """
  if beta == 0.0:
    x, y = alpha * p, alpha * q
    return jnp.sum(jnp.exp(x) * (x - y) - jnp.exp(x) + jnp.exp(y), axis=-1) / alpha**2
  if alpha == 0.0:
    return alpha_beta(q, p, alpha=beta, beta=0.0)
  both, x = alpha + beta, p - q
  far = jnp.exp(alpha * p + beta * q) - alpha / both * jnp.exp(both * p) - beta / both * jnp.exp(both * q)
  y = jnp.maximum(x, _FAR)
  near = jnp.exp(both * p) * (jnp.expm1(-beta * y) - beta / both * jnp.expm1(-both * y))
  return -jnp.sum(jnp.where(x > _FAR, near, far), axis=-1) / (alpha * beta)


def taid(p: LogProbs, q: LogProbs, *, t: float | Float[Array, ""]) -> PerToken:
  """KL(r ‖ q) with r ∝ q^(1 − t) p^t, q in r held constant; t = 1 is forward KL (2501.16937)."""
  r = jax.nn.log_softmax((1.0 - t) * jax.lax.stop_gradient(q) + t * p, axis=-1)
  return forward_kl(jnp.maximum(r, NOTHING), q)


def decoupled_kl(p: LogProbs, q: LogProbs, labels: Int[Array, " M"], *, alpha: float, beta: float) -> PerToken:
  """α KL of (target, rest) + β KL among the rest, each side renormalised over it (DKD, 2203.08679).

  `labels` are the buckets that hold the targets.
  """
  target = jax.nn.one_hot(labels, p.shape[-1], dtype=bool)
  p_target, q_target = (jnp.sum(jnp.where(target, x, 0.0), axis=-1, keepdims=True) for x in (p, q))
  p_others, q_others = (jnp.where(target, NOTHING, x) for x in (p, q))
  p_rest, q_rest = (jax.nn.logsumexp(x, axis=-1, keepdims=True) for x in (p_others, q_others))
  binary = forward_kl(jnp.concatenate([p_target, p_rest], -1), jnp.concatenate([q_target, q_rest], -1))
  p_among, q_among = (
    jnp.where(x <= NOTHING, NOTHING, x - rest) for x, rest in ((p_others, p_rest), (q_others, q_rest))
  )
  return alpha * binary + beta * forward_kl(p_among, q_among)


Divergence = Callable[..., PerToken]

DIVERGENCES: Mapping[str, tuple[Divergence, Mapping[str, float]]] = {
  "forward_kl": (forward_kl, {}),
  "reverse_kl": (reverse_kl, {}),
  "jsd": (jsd, {"beta": 0.5}),
  "skew_kl": (skew_kl, {"alpha": 0.1}),
  "skew_reverse_kl": (skew_reverse_kl, {"alpha": 0.1}),
  "total_variation": (total_variation, {}),
  "alpha_beta": (alpha_beta, {"alpha": 0.5, "beta": 0.5}),
}
"""Name -> (function, its numbers and their defaults), for those that need nothing but p and q."""

OF_LOGITS: Mapping[Divergence, Callable[[Logits, Logits], PerToken]] = {forward_kl: forward_kl_of_logits}
"""The same from (teacher's, student's) dense logits, for those that have a cheaper slope there."""
