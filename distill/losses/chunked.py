"""Losses from (hidden, readout) pairs, a chunk of tokens at a time: logits of all tokens never exist."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distill.kernels.head_gradient import add_head_gradient
from distill.kernels.matmul import matmul, transposed
from distill.losses.divergences import NOTHING, OF_LOGITS, Divergence, normalisers
from distill.types import Readout, SparseTarget

_CHUNK_BYTES = 8 * 2**20
_LEAST = 128
_LANES = 16

Scalar = float | Float[Array, ""]


def chunk_tokens(vocab: int, *, tokens: int, width: int = 0) -> int:
  """Tokens a chunk: as many as keep one float32 chunk of logits within 8 MiB, at least 128, at most all.

  Where each chunk adds to the gradient of a kernel of `width` rows, nearly half of that many: with fewer, the
  kernel is read and written more often than the logits are.
  """
  return min(tokens, max(_LEAST, 7 * width // 16, _CHUNK_BYTES // (4 * vocab)))


@jax.custom_vjp
def cross_entropy(logits: Float[Array, "M V"], labels: Int[Array, " M"]) -> Float[Array, " M"]:
  """−log softmax(logits)[label] per token, in nats; labels are ids of the vocabulary."""
  return _cross_entropy_forward(logits, labels)[0]


def _cross_entropy_forward(logits, labels):
  most, log_sum = normalisers(logits)
  chosen = jnp.take_along_axis(logits, labels[:, None], axis=-1)
  return (log_sum - (chosen - most))[:, 0], (logits, labels, most, log_sum)


def _cross_entropy_backward(saved, cotangent):
  """From the logits again, so that exponentials of all of them are not kept."""
  logits, labels, most, log_sum = saved
  chosen = jnp.arange(logits.shape[-1]) == labels[:, None]
  return cotangent[:, None] * (jnp.exp(logits - most - log_sum) - chosen), None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def z_loss(logits: Float[Array, "M V"]) -> Float[Array, " M"]:
  """Square of logsumexp(logits) per token: keeps the normaliser near one (PaLM, 2204.02311)."""
  return jnp.square(jax.nn.logsumexp(logits, axis=-1))


def shared_logits(
  student: Float[Array, "M V"], teacher: Float[Array, "M W"], *, temperature: float | Float[Array, ""]
) -> tuple[Float[Array, "M K"], Float[Array, "M K"]]:
  """Logits (teacher, student) of the vocabulary both have, divided by `temperature`."""
  shared = min(student.shape[-1], teacher.shape[-1])
  return teacher[:, :shared] / temperature, student[:, :shared] / temperature


def dense_pair(
  student: Float[Array, "M V"], teacher: Float[Array, "M W"], *, temperature: float | Float[Array, ""]
) -> tuple[Float[Array, "M K"], Float[Array, "M K"]]:
  """Log-probabilities (teacher, student) over the vocabulary both have, logits divided by `temperature`."""
  logits = shared_logits(student, teacher, temperature=temperature)
  p, q = (jnp.maximum(jax.nn.log_softmax(x, axis=-1), NOTHING) for x in logits)
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLoss:
  """One summand of a loss over tokens.

  Attributes:
    per_token: (student logits [M, V], teacher, labels [M], temperature, extra) -> [M]; the teacher's logits or sparse
      knowledge.
    weight: Its factor in the total.
    temperature: Divides logits, for a divergence.
    extra: Scalars that it takes besides, such as TAID's t.
  """

  per_token: Callable[..., Float[Array, " M"]]
  weight: Scalar = 1.0
  temperature: Scalar = 1.0
  extra: tuple[Scalar, ...] = ()


def cross_entropy_loss(*, weight: Scalar = 1.0) -> TokenLoss:
  """`cross_entropy` with the labels."""
  return TokenLoss(per_token=lambda logits, teacher, labels, *_: cross_entropy(logits, labels), weight=weight)


def normaliser_loss(*, weight: Scalar = 1.0) -> TokenLoss:
  """`z_loss` of the student."""
  return TokenLoss(per_token=lambda logits, *_: z_loss(logits), weight=weight)


def divergence_loss(
  divergence: Divergence,
  *,
  labelled: bool = False,
  weight: Scalar = 1.0,
  temperature: Scalar = 1.0,
  extra: tuple[Scalar, ...] = (),
) -> TokenLoss:
  """A divergence of the student from the teacher, not multiplied by the square of the temperature.

  Args:
    divergence: (p, q, *extra) of log-probabilities [M, K], as in `divergences`; (p, q, buckets, *extra) if `labelled`.
    labelled: Whether it asks for the buckets that hold the labels.
    weight: Its factor.
    temperature: Divides both logits; a sparse teacher's knowledge was made at the same.
    extra: What the divergence takes last.
  """

  of_logits = OF_LOGITS.get(divergence)

  def per_token(logits_MV, teacher, labels_M, temperature, extra):
    sparse = isinstance(teacher, SparseTarget)
    if of_logits and not sparse:
      return of_logits(*shared_logits(logits_MV, teacher, temperature=temperature))
    p, q = (sparse_pair if sparse else dense_pair)(logits_MV, teacher, temperature=temperature)
    return divergence(p, q, _bucket(labels_M, teacher), *extra) if labelled else divergence(p, q, *extra)

  return TokenLoss(per_token=per_token, weight=weight, temperature=temperature, extra=extra)


def _bucket(labels_M, teacher):
  """Which bucket holds each label: the token's own, or its place in the support, or the tail."""
  if not isinstance(teacher, SparseTarget):
    return labels_M
  inside = teacher.ids == labels_M[:, None]
  return jnp.where(inside.any(-1), jnp.argmax(inside, axis=-1), teacher.ids.shape[-1])


def chunked_divergence(
  divergence: Divergence,
  *,
  hidden: Float[Array, "M D"],
  readout: Readout,
  target: Float[Array, "M W"] | SparseTarget,
  teacher_readout: Readout | None = None,
  mask: Float[Array, " M"],
) -> Float[Array, ""]:
  """Sum over tokens of mask * divergence(teacher, student) at temperature 1, as `chunked_losses`."""
  return chunked_losses(
    [divergence_loss(divergence)],
    hidden=hidden,
    readout=readout,
    target=target,
    teacher_readout=teacher_readout,
    mask=mask,
  )[0]


def chunked_losses(
  losses: Sequence[TokenLoss],
  *,
  hidden: Float[Array, "M D"],
  readout: Readout,
  target: Float[Array, "M W"] | SparseTarget | None = None,
  teacher_readout: Readout | None = None,
  labels: Int[Array, " M"] | None = None,
  mask: Float[Array, " M"],
  shards: int = 1,
) -> tuple[Float[Array, ""], Float[Array, " N"]]:
  """Σ weight · sum of several losses that share the logits, and each one's sum over tokens of mask * loss.

  The caller divides by the count of the global batch. Gradients flow into `hidden` and `readout` from the total alone.

  Args:
    losses: What is summed.
    hidden: The student's final hidden states.
    readout: The student's.
    target: The teacher's hidden states, or its sparse knowledge, if a loss asks for a teacher.
    teacher_readout: With hidden states, how they become logits. Padded widths, and vocabularies whose extra ids no
      tokenizer makes, may differ: the shared ids count.
    labels: Target tokens, if a loss asks for them.
    mask: Weight of each token, 0 or 1.
    shards: Over how many parts of a mesh the tokens are spread, in order; each works through its own chunks, and the
      gradients of their readouts are added up once.
  """
  count = hidden.shape[0]
  labels = jnp.zeros(count, jnp.int32) if labels is None else labels
  numbers = [(loss.weight, loss.temperature, loss.extra) for loss in losses]
  functions = tuple(loss.per_token for loss in losses)
  shared = (jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), numbers), teacher_readout)
  shards = shards if count % shards == 0 else 1
  return _total((functions, shards), hidden, readout, (target, labels, mask), shared)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(fixed, hidden, readout, tokens, shared):
  """The total and the sums; gradients are formed on the way, so that no chunk runs twice."""
  return _walk(fixed, hidden, readout, tokens, shared, grads=False)[0]


def _chunk(functions, raw_MV, readout, tokens, shared):
  """(total, sums) of one chunk, from hidden @ kernel."""
  (target, labels_M, mask_M), (numbers, teacher_readout) = tokens, shared
  logits_MV = readout.finish(raw_MV)[:, : readout.vocab_size]
  if teacher_readout is not None:
    target = teacher_readout.logits(target)[:, : teacher_readout.vocab_size]
  total, sums = jnp.zeros((), jnp.float32), []
  for per_token, (weight, temperature, extra) in zip(functions, numbers, strict=True):
    loss_M = per_token(logits_MV, target, labels_M, temperature, extra)
    sums.append(jnp.sum(jnp.where(mask_M > 0, mask_M * loss_M, 0.0)))
    total = total + weight * sums[-1]
  return total, jnp.stack(sums)


def _walk(fixed, hidden, readout, tokens, shared, *, grads):
  """((total, sums), gradient of hidden, gradient of readout)."""
  (functions, shards), (count, width) = fixed, hidden.shape
  each = count // shards
  size = chunk_tokens(readout.kernel.shape[-1], tokens=each, width=width if grads else 0)
  # As even as whole vectors allow: what the last chunk has over again is work for nothing.
  even = -(-each // -(-each // size))
  size = min(size, -(-even // _LANES) * _LANES)
  starts = jnp.arange(-(-each // size)) * size
  apart = (lambda x: x) if shards == 1 else (lambda x: x.reshape(shards, each, *x.shape[1:]))
  hidden, tokens = apart(hidden), jax.tree.map(apart, tokens)
  axis, lead = (0, ()) if shards == 1 else (1, (shards,))
  kernel = jnp.asarray(readout.kernel)

  def spread(function, *axes):
    return function if shards == 1 else jax.vmap(function, in_axes=axes)

  def chunk(start):
    """(where it begins, hidden, tokens): the last ends where the tokens do, and what it has over again is masked."""
    begin = jnp.minimum(start, each - size)
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=begin, slice_size=size, axis=axis)
    hidden_MD, (target, labels_M, mask_M) = cut(hidden), jax.tree.map(cut, tokens)
    mask_M = jnp.where(begin + jnp.arange(size) >= start, mask_M, 0.0)
    return begin, hidden_MD, (target, labels_M, mask_M)

  def value(raw_MV, readout, tokens):
    return _chunk(functions, raw_MV, readout, tokens, shared)

  def value_only(sums, start):
    _, hidden_MD, tokens = chunk(start)
    raw_MV = matmul(hidden_MD.astype(kernel.dtype), kernel)
    return jax.tree.map(jnp.add, sums, spread(value, 0, None, 0)(raw_MV, readout, tokens)), None

  def value_and_grads(carry, start):
    sums, hidden_grad, kernel_grad, bias_grad = carry
    begin, hidden_MD, tokens = chunk(start)
    operand_MD = hidden_MD.astype(kernel.dtype)
    grad = spread(jax.value_and_grad(value, argnums=(0, 1), has_aux=True), 0, None, 0)
    found, (raw_grad, rest) = grad(matmul(operand_MD, kernel), readout, tokens)
    # Transposed here, where float32 products do it on the way: before the loop it would be a second head in memory.
    new = jnp.matmul(raw_grad.astype(kernel.dtype), transposed(kernel), preferred_element_type=jnp.float32)
    old = jax.lax.dynamic_slice_in_dim(hidden_grad, begin, size, axis=axis)
    new = old + new.astype(hidden_grad.dtype)
    hidden_grad = jax.lax.dynamic_update_slice_in_dim(hidden_grad, new, begin, axis=axis)
    kernel_grad = spread(add_head_gradient, 0, 0, 0)(kernel_grad, operand_MD, raw_grad)
    bias_grad = jax.tree.map(lambda sum_, new: sum_ + new.astype(jnp.float32), bias_grad, rest.bias)
    return (jax.tree.map(jnp.add, sums, found), hidden_grad, kernel_grad, bias_grad), None

  def joined(x):
    return x if shards == 1 else jnp.sum(x, axis=0)

  sums = (jnp.zeros(lead, jnp.float32), jnp.zeros((*lead, len(functions)), jnp.float32))
  if not grads:
    return jax.tree.map(joined, jax.lax.scan(value_only, sums, starts)[0]), None, None
  zero = jax.tree.map(lambda x: jnp.zeros((*lead, *x.shape), jnp.float32), (readout.kernel, readout.bias))
  carry = (sums, jnp.zeros_like(hidden), *zero)
  (sums, hidden_grad, kernel_grad, bias_grad), _ = jax.lax.scan(value_and_grads, carry, starts)
  readout_grad = dataclasses.replace(readout, kernel=joined(kernel_grad), bias=jax.tree.map(joined, bias_grad))
  return jax.tree.map(joined, sums), hidden_grad.reshape(count, width), readout_grad


def _forward(fixed, hidden, readout, tokens, shared):
  found, hidden_grad, readout_grad = _walk(fixed, hidden, readout, tokens, shared, grads=True)
  return found, (hidden_grad, jax.tree.map(lambda grad, x: grad.astype(x.dtype), readout_grad, readout))


def _backward(fixed, saved, cotangent):
  del fixed
  hidden_grad, readout_grad = jax.tree.map(lambda grad: (cotangent[0] * grad).astype(grad.dtype), saved)
  return hidden_grad, readout_grad, None, None


_total.defvjp(_forward, _backward)
