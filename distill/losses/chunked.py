"""Losses from (hidden, readout) pairs, a chunk of tokens at a time: logits of all tokens never exist."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distill.types import Readout

_CHUNK_BYTES = 32 * 2**20

PerToken = Callable[[Any, Any, Any], Float[Array, " M"]]


def chunk_tokens(vocab: int, *, tokens: int) -> int:
  """Tokens a chunk: as many as keep one float32 chunk of logits within 32 MiB, at least 16, at most all."""
  return min(tokens, max(16, _CHUNK_BYTES // (4 * vocab)))


def forward_kl(
  student: Float[Array, "M V"], teacher: Float[Array, "M V"], *, temperature: float | Float[Array, ""]
) -> Float[Array, " M"]:
  """KL(teacher ‖ student) per token in nats, both logits divided by `temperature`; not multiplied by its square."""
  student, teacher = student / temperature, teacher / temperature
  normaliser = jax.nn.logsumexp(student, axis=-1) - jax.nn.logsumexp(teacher, axis=-1)
  return jnp.sum(jax.nn.softmax(teacher, axis=-1) * (teacher - student), axis=-1) + normaliser


def cross_entropy(logits: Float[Array, "M V"], labels: Int[Array, " M"]) -> Float[Array, " M"]:
  """−log softmax(logits)[label] per token, in nats."""
  return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]


def chunked_forward_kl(
  hidden: Float[Array, "M D"],
  readout: Readout,
  teacher_hidden: Float[Array, "M W"],
  teacher_readout: Readout,
  mask: Float[Array, " M"],
  temperature: Float[Array, ""],
) -> Float[Array, ""]:
  """Sum over tokens of mask * KL(teacher ‖ student); the caller divides by the count of the global batch.

  Both readouts share the true vocabulary; their padded widths may differ. `hidden` and `readout` get gradients; the
  teacher, the mask and the temperature get none.
  """
  return _chunked_sum(_kl_chunk, hidden, readout, teacher_hidden, (teacher_readout, temperature), mask)


def chunked_cross_entropy(
  hidden: Float[Array, "M D"], readout: Readout, labels: Int[Array, " M"], mask: Float[Array, " M"]
) -> Float[Array, ""]:
  """Sum over tokens of mask * cross-entropy with `labels`; `hidden` and `readout` get gradients."""
  return _chunked_sum(lambda logits, labels, _: cross_entropy(logits, labels), hidden, readout, labels, (), mask)


def _kl_chunk(logits_MV, teacher_MD, shared):
  readout, temperature = shared
  return forward_kl(logits_MV, readout.logits(teacher_MD)[:, : readout.vocab_size], temperature=temperature)


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

  xs = (cut(hidden), cut(target), cut(mask))
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
