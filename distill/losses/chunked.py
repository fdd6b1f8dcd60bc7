"""Losses from (hidden, readout) pairs, a chunk of tokens at a time: logits of all tokens never exist."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distill.losses.divergences import NOTHING, Divergence
from distill.types import Readout, SparseTarget

_CHUNK_BYTES = 32 * 2**20

PerToken = Callable[[Any, Any, Any], Float[Array, " M"]]


def chunk_tokens(vocab: int, *, tokens: int) -> int:
  """Tokens a chunk: as many as keep one float32 chunk of logits within 32 MiB, at least 16, at most all."""
  return min(tokens, max(16, _CHUNK_BYTES // (4 * vocab)))


def cross_entropy(logits: Float[Array, "M V"], labels: Int[Array, " M"]) -> Float[Array, " M"]:
  """−log softmax(logits)[label] per token, in nats."""
  return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]


def z_loss(logits: Float[Array, "M V"]) -> Float[Array, " M"]:
  """Square of logsumexp(logits) per token: keeps the normaliser near one (PaLM, 2204.02311)."""
  return jnp.square(jax.nn.logsumexp(logits, axis=-1))


def dense_pair(
  student: Float[Array, "M V"], teacher: Float[Array, "M W"], *, temperature: float | Float[Array, ""]
) -> tuple[Float[Array, "M K"], Float[Array, "M K"]]:
  """Log-probabilities (teacher, student) over the vocabulary both have, logits divided by `temperature`."""
  shared = min(student.shape[-1], teacher.shape[-1])
  p, q = (jnp.maximum(jax.nn.log_softmax(x[:, :shared] / temperature, axis=-1), NOTHING) for x in (teacher, student))
  return p, q


def sparse_pair(
  student: Float[Array, "M V"], target: SparseTarget, *, temperature: float | Float[Array, ""]
) -> tuple[Float[Array, "M K"], Float[Array, "M K"]]:
  """Log-probabilities (teacher, student) of the support, then of all the rest as one bucket.

  The student's come from its full softmax; nothing is renormalised over the support. Ids past its vocabulary are left
  out of the teacher's distribution, which is that of the others then; where nothing else was kept, it has no mass.
  """
  ids = jnp.where(target.ids < student.shape[-1], target.ids, -1)
  p = jnp.concatenate([jnp.where(ids >= 0, target.log_probs, NOTHING), target.tail[:, None]], axis=-1)
  p = jnp.maximum(p, NOTHING)
  cut = jnp.any(ids != target.ids, axis=-1, keepdims=True)
  left = jnp.where(cut, jax.nn.logsumexp(p, axis=-1, keepdims=True), 0.0)
  p = jnp.where(left > NOTHING / 2, jnp.maximum(p - left, NOTHING), NOTHING)
  return p, buckets(student / temperature, ids)


@jax.custom_vjp
def buckets(logits: Float[Array, "M V"], ids: Int[Array, "M k"]) -> Float[Array, "M K"]:
  """Log-probabilities of `ids` (-1: an unused place) and of everything else."""
  return _buckets_forward(logits, ids)[0]


def _outside(logits, ids):
  """`logits` with those of `ids` far below all others."""
  rows = jnp.arange(logits.shape[0])[:, None]
  return logits.at[rows, jnp.where(ids >= 0, ids, logits.shape[-1])].set(-jnp.inf, mode="drop")


def _buckets_forward(logits, ids):
  normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  support = jnp.take_along_axis(logits, jnp.maximum(ids, 0), axis=-1) - normaliser
  support = jnp.maximum(jnp.where(ids >= 0, support, NOTHING), NOTHING)
  inside = jnp.sum(jnp.exp(support), axis=-1, keepdims=True)
  # Each form where the other would cancel: a small tail is summed, a small support is subtracted.
  summed = jax.nn.logsumexp(_outside(logits, ids), axis=-1, keepdims=True) - normaliser
  tail = jnp.where(inside < 0.5, jnp.log1p(-jnp.minimum(inside, 0.5)), jnp.maximum(summed, NOTHING))
  return jnp.concatenate([support, tail], axis=-1), (logits, ids, normaliser, support, inside, tail)


def _buckets_backward(saved, cotangent):
  logits, ids, normaliser, support, inside, tail = saved
  of_support, of_tail = cotangent[:, :-1], cotangent[:, -1:]
  total = jnp.sum(of_support, axis=-1, keepdims=True)
  # of_tail / tail − (all cotangents), over one denominator: the two terms nearly cancel where the tail is nearly all.
  factor = of_tail * inside - jnp.exp(tail) * total
  gradient = factor * jnp.exp(_outside(logits, ids) - normaliser - tail)
  rows = jnp.arange(logits.shape[0])[:, None]
  chosen = of_support - jnp.exp(support) * (total + of_tail)
  return gradient.at[rows, jnp.where(ids >= 0, ids, logits.shape[-1])].set(chosen, mode="drop"), None


buckets.defvjp(_buckets_forward, _buckets_backward)


def chunked_divergence(
  divergence: Divergence,
  *,
  hidden: Float[Array, "M D"],
  readout: Readout,
  target: Float[Array, "M W"] | SparseTarget,
  teacher_readout: Readout | None = None,
  labels: Int[Array, " M"] | None = None,
  mask: Float[Array, " M"],
  temperature: float | Float[Array, ""] = 1.0,
  extra: Any = (),
) -> Float[Array, ""]:
  """Sum over tokens of mask * divergence(teacher, student); the caller divides by the count of the global batch.

  Args:
    divergence: (p, q, *extra) of log-probabilities [M, K], as in `divergences`; with `labels`, (p, q, labels, *extra).
    hidden: The student's final hidden states; they and `readout` get gradients, nothing else does.
    readout: The student's.
    target: The teacher's hidden states, or its sparse knowledge at the same temperature.
    teacher_readout: With hidden states, how they become logits. Padded widths, and vocabularies whose extra ids no
      tokenizer makes, may differ: the shared ids count.
    labels: Target tokens, for a divergence that asks for them.
    mask: Weight of each token, 0 or 1.
    temperature: Divides both logits; the result is not multiplied by its square.
    extra: Scalars that the divergence takes last, such as TAID's t.
  """
  shared = (teacher_readout, jnp.asarray(temperature, jnp.float32), extra)
  return _chunked_sum(functools.partial(_divergence_chunk, divergence), hidden, readout, (target, labels), shared, mask)


def _divergence_chunk(divergence, logits_MV, target, shared):
  (target, labels), (readout, temperature, extra) = target, shared
  if isinstance(target, SparseTarget):
    p, q = sparse_pair(logits_MV, target, temperature=temperature)
    if labels is not None:
      inside = target.ids == labels[:, None]
      labels = jnp.where(inside.any(-1), jnp.argmax(inside, axis=-1), target.ids.shape[-1])
  else:
    teacher = readout.logits(target)[:, : readout.vocab_size]
    p, q = dense_pair(logits_MV, teacher, temperature=temperature)
  return divergence(p, q, *extra) if labels is None else divergence(p, q, labels, *extra)


def chunked_z_loss(hidden: Float[Array, "M D"], readout: Readout, mask: Float[Array, " M"]) -> Float[Array, ""]:
  """Sum over tokens of mask * z-loss; `hidden` and `readout` get gradients."""
  return _chunked_sum(lambda logits, _, __: z_loss(logits), hidden, readout, (), (), mask)


def chunked_cross_entropy(
  hidden: Float[Array, "M D"], readout: Readout, labels: Int[Array, " M"], mask: Float[Array, " M"]
) -> Float[Array, ""]:
  """Sum over tokens of mask * cross-entropy with `labels`; `hidden` and `readout` get gradients."""
  return _chunked_sum(lambda logits, labels, _: cross_entropy(logits, labels), hidden, readout, labels, (), mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_sum(per_token: PerToken, hidden, readout, target, shared, mask):
  """Sum of mask * per_token(logits, target, shared), gradients formed on the way so that no chunk runs twice."""
  return _walk(per_token, hidden, readout, target, shared, mask, grads=False)[0]


def _walk(per_token, hidden, readout, target, shared, mask, *, grads):
  count, vocab = hidden.shape[0], readout.vocab_size
  size = chunk_tokens(readout.kernel.shape[-1], tokens=count)
  chunks = -(-count // size)

  def cut(x):
    x = jnp.pad(x, [(0, chunks * size - count)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(chunks, size, *x.shape[1:])

  def chunk_sum(hidden_MD, readout, target, mask_M):
    loss_M = per_token(readout.logits(hidden_MD)[:, :vocab], target, shared)
    return jnp.sum(jnp.where(mask_M > 0, mask_M * loss_M, 0.0))

  def value_only(total, chunk):
    hidden_MD, target, mask_M = chunk
    return total + chunk_sum(hidden_MD, readout, target, mask_M), None

  def value_and_grads(carry, chunk):
    total, readout_grad = carry
    hidden_MD, target, mask_M = chunk
    value, (hidden_grad, grad) = jax.value_and_grad(chunk_sum, argnums=(0, 1))(hidden_MD, readout, target, mask_M)
    readout_grad = jax.tree.map(lambda sum_, new: sum_ + new.astype(jnp.float32), readout_grad, grad)
    return (total + value, readout_grad), hidden_grad

  xs = (cut(hidden), jax.tree.map(cut, target), cut(mask))
  total = jnp.zeros((), jnp.float32)
  if not grads:
    return jax.lax.scan(value_only, total, xs)
  zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), readout)
  (total, readout_grad), hidden_grad = jax.lax.scan(value_and_grads, (total, zero), xs)
  return total, hidden_grad.reshape(-1, hidden.shape[-1])[:count], readout_grad


def _forward(per_token, hidden, readout, target, shared, mask):
  total, hidden_grad, readout_grad = _walk(per_token, hidden, readout, target, shared, mask, grads=True)
  return total, (hidden_grad, jax.tree.map(lambda grad, x: grad.astype(x.dtype), readout_grad, readout))


def _backward(per_token, saved, cotangent):
  hidden_grad, readout_grad = jax.tree.map(lambda grad: (cotangent * grad).astype(grad.dtype), saved)
  return hidden_grad, readout_grad, None, None, None


_chunked_sum.defvjp(_forward, _backward)
