"""Divergences from (hidden, readout) pairs, a chunk of tokens at a time: logits of all tokens never exist."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from distill.types import Readout

_CHUNK_BYTES = 32 * 2**20


def chunk_tokens(vocab: int, *, tokens: int) -> int:
  """Tokens a chunk: as many as keep one float32 chunk of logits within 32 MiB, at least 16, at most all."""
  return min(tokens, max(16, _CHUNK_BYTES // (4 * vocab)))


def forward_kl(
  student: Float[Array, "M V"], teacher: Float[Array, "M W"], *, temperature: float | Float[Array, ""]
) -> Float[Array, " M"]:
  """KL(teacher ‖ student) per token in nats, both logits divided by `temperature`; not multiplied by its square."""
  log_q = jax.nn.log_softmax(student / temperature)
  log_p = jax.nn.log_softmax(teacher / temperature)
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


@jax.custom_vjp
def chunked_forward_kl(
  hidden: Float[Array, "M D"],
  readout: Readout,
  teacher_hidden: Float[Array, "M W"],
  teacher_readout: Readout,
  mask: Float[Array, " M"],
  temperature: Float[Array, ""],
) -> Float[Array, ""]:
  """Sum over tokens of mask * KL(teacher ‖ student); the caller divides by the count of the global batch.

  Both readouts share the true vocabulary; their padded widths may differ. Gradients with respect to `hidden` and
  `readout` are formed on the way forward, so that no chunk is computed twice; the teacher, the mask and the
  temperature get none.
  """
  return _walk(hidden, readout, teacher_hidden, teacher_readout, mask, temperature)[0]


def _walk(hidden, readout, teacher_hidden, teacher_readout, mask, temperature):
  count, vocab = hidden.shape[0], readout.vocab_size
  size = chunk_tokens(max(readout.kernel.shape[-1], teacher_readout.kernel.shape[-1]), tokens=count)
  chunks = -(-count // size)

  def cut(x):
    x = jnp.pad(x, [(0, chunks * size - count)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(chunks, size, *x.shape[1:])

  def chunk_sum(hidden_MD, readout, teacher_MD, mask_M):
    student = readout.logits(hidden_MD)[:, :vocab]
    teacher = jax.lax.stop_gradient(teacher_readout.logits(teacher_MD)[:, :vocab])
    kl_M = forward_kl(student, teacher, temperature=temperature)
    return jnp.sum(jnp.where(mask_M > 0, mask_M * kl_M, 0.0))

  def body(carry, chunk):
    total, readout_grad = carry
    hidden_MD, teacher_MD, mask_M = chunk
    value, (hidden_grad, grad) = jax.value_and_grad(chunk_sum, argnums=(0, 1))(hidden_MD, readout, teacher_MD, mask_M)
    readout_grad = jax.tree.map(lambda sum_, new: sum_ + new.astype(jnp.float32), readout_grad, grad)
    return (total + value, readout_grad), hidden_grad

  zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), readout)
  (total, readout_grad), hidden_grad = jax.lax.scan(
    body, (jnp.zeros((), jnp.float32), zero), (cut(hidden), cut(teacher_hidden), cut(mask))
  )
  return total, hidden_grad.reshape(-1, hidden.shape[-1])[:count], readout_grad


def _forward(hidden, readout, teacher_hidden, teacher_readout, mask, temperature):
  total, hidden_grad, readout_grad = _walk(hidden, readout, teacher_hidden, teacher_readout, mask, temperature)
  readout_grad = jax.tree.map(lambda grad, x: grad.astype(x.dtype), readout_grad, readout)
  return total, (hidden_grad, readout_grad, teacher_hidden, teacher_readout, mask, temperature)


def _backward(saved, cotangent):
  hidden_grad, readout_grad, *rest = saved
  scaled = jax.tree.map(lambda grad: (cotangent * grad).astype(grad.dtype), (hidden_grad, readout_grad))
  return (*scaled, *jax.tree.map(jnp.zeros_like, tuple(rest)))


chunked_forward_kl.defvjp(_forward, _backward)
