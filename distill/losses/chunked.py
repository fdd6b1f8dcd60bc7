"""Sums token losses chunk by chunk from hidden states, so that the logits of a whole batch are never in memory."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distill.axes.logical import constrain, sum_shards
from distill.kernels.head_gradient import add_head_gradient
from distill.kernels.matmul import matmul, transposed
from distill.losses.divergences import Divergence
from distill.losses.token_losses import TokenLoss, divergence_loss
from distill.types import Readout, SparseTarget

_CHUNK_BYTES = 8 * 2**20
_MIN_CHUNK = 128
# Chunks of tokens are a multiple of the width of a vector register, where they can be.
_LANES = 16


def chunk_tokens(vocab: int, *, tokens: int, width: int = 0) -> int:
  """Returns the number of tokens per chunk.

  A chunk has as many tokens as give 8 MiB of float32 logits, but at least 128 and at least 7/16 · `width`. It never has
  more than `tokens`.

  Args:
    vocab: Vocabulary size V.
    tokens: Number of tokens M to divide into chunks.
    width: Model width D if the gradient of the head is computed, else 0. Every chunk reads and writes this [D, V]
      gradient. In chunks below 7/16 D tokens, that would take more memory traffic than the chunk's logits.
  """
  return min(tokens, max(_MIN_CHUNK, 7 * width // 16, _CHUNK_BYTES // (4 * vocab)))


def chunked_losses(
  losses: Sequence[TokenLoss],
  *,
  hidden: Float[Array, "M D"],
  readout: Readout,
  target: Float[Array, "M teacher_D"] | SparseTarget | None = None,
  teacher_readout: Readout | None = None,
  labels: Int[Array, " M"] | None = None,
  mask: Float[Array, " M"],
  shards: int = 1,
) -> tuple[Float[Array, ""], Float[Array, " losses"]]:
  """Computes the weighted total of several token losses of the same logits, and the unweighted sum of each loss.

  Only the total has gradients, with respect to `hidden` and `readout`. They are computed in the forward pass, chunk by
  chunk, so that no chunk is computed twice. The results are sums; the caller divides them by a token count.

  Args:
    losses: The token losses.
    hidden: The student's final hidden states.
    readout: The student's readout.
    target: The teacher's hidden states or sparse target; None if no loss needs a teacher.
    teacher_readout: Turns the teacher's hidden states into logits; None without hidden states. If the vocabularies
      differ in size, the ids that both have are compared.
    labels: Label of each token, a token id; None if no loss needs labels.
    mask: Weight of each token, 0 or 1.
    shards: Number of equal parts that the tokens are divided into, in order, one for each part of the mesh. Each part
      goes through its own chunks; the gradients of the readout are summed over the parts once, at the end. If the
      tokens cannot be divided equally, there is only one part.

  Returns:
    (total, sums): for each loss, its sum is Σ mask · loss over the tokens; the total is Σ weight · sum over the losses.
  """
  count = hidden.shape[0]
  labels = jnp.zeros(count, jnp.int32) if labels is None else labels
  numbers = [(loss.weight, loss.temperature, loss.extra) for loss in losses]
  functions = tuple(loss.per_token for loss in losses)
  shared = (jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), numbers), teacher_readout)
  shards = shards if count % shards == 0 else 1
  return _total((functions, shards), hidden, readout, _Tokens(target, labels, mask), shared)


def _gathered(readout: Readout) -> Readout:
  """Returns a readout whose kernel every device holds whole, up to the parts of the vocabulary.

  Without it XLA gathers the kernel again for every chunk. It belongs inside the custom gradient: outside, the gradient
  of the kernel would be gathered as well.
  """
  return dataclasses.replace(readout, kernel=constrain(jnp.asarray(readout.kernel), (None, "vocab")))


def chunked_divergence(
  divergence: Divergence,
  *,
  hidden: Float[Array, "M D"],
  readout: Readout,
  target: Float[Array, "M teacher_D"] | SparseTarget,
  teacher_readout: Readout | None = None,
  mask: Float[Array, " M"],
) -> Float[Array, ""]:
  """Computes Σ mask · divergence over the tokens, for a single divergence at temperature 1.

  Args: as `chunked_losses`, but `divergence` takes the place of `losses`; it is a function such as `forward_kl` of the
    module `losses.divergences`.
  """
  return chunked_losses(
    [divergence_loss(divergence)],
    hidden=hidden,
    readout=readout,
    target=target,
    teacher_readout=teacher_readout,
    mask=mask,
  )[0]


class _Tokens(NamedTuple):
  """The arrays with one entry per token that accompany the student's hidden states: target, labels and mask."""

  target: Any
  labels: Any
  mask: Any


@dataclasses.dataclass(frozen=True)
class _Chunks:
  """Division of tokens into shards, and of each shard's tokens into chunks of one size.

  With several shards, arrays have a leading dimension of shards.
  """

  shards: int
  shard_tokens: int
  size: int

  @classmethod
  def of(cls, tokens: int, *, shards: int, vocab: int, width: int) -> "_Chunks":
    """Divides tokens into shards, and the tokens of each shard into as few chunks as `chunk_tokens` allows.

    All chunks have one size: the smallest that gives this number of chunks, rounded up to a multiple of `_LANES` where
    possible. The last chunk may therefore overlap its predecessor, and the overlap is wasted work.

    Args:
      tokens: Number of tokens of all shards together.
      shards: Number of shards, a divisor of `tokens`.
      vocab: As in `chunk_tokens`.
      width: As in `chunk_tokens`.
    """
    shard_tokens = tokens // shards
    size = chunk_tokens(vocab, tokens=shard_tokens, width=width)
    even = -(-shard_tokens // -(-shard_tokens // size))
    return cls(shards, shard_tokens, min(size, -(-even // _LANES) * _LANES))

  @property
  def axis(self) -> int:
    """The axis of tokens in arrays from `split`: 0 with one shard; else 1, as axis 0 is that of shards."""
    return 0 if self.shards == 1 else 1

  @property
  def lead(self) -> tuple[int, ...]:
    return () if self.shards == 1 else (self.shards,)

  def starts(self) -> Int[Array, " chunks"]:
    """Returns the index of each chunk's first token within its shard, as if chunks never overlapped.

    The last chunk may then reach past the shard's last token; in that case `take` moves it back.
    """
    return jnp.arange(-(-self.shard_tokens // self.size)) * self.size

  def split(self, tree: Any) -> Any:
    """Reshapes arrays [M,…] to [shards,M / shards,…]; with one shard they keep the shape [M,…]."""

    def one(x: Array) -> Array:
      x = x.reshape(*self.lead, self.shard_tokens, *x.shape[1:])
      return x if self.shards == 1 else constrain(x, ("batch", *[None] * (x.ndim - 1)))

    return jax.tree.map(one, tree)

  def each_shard(self, function: Callable[..., Any], *axes: int | None) -> Callable[..., Any]:
    """Returns `function`, mapped over the shards of its arguments; `axes` are the `in_axes` of `jax.vmap`."""
    return function if self.shards == 1 else jax.vmap(function, in_axes=axes)

  def sum_shards(self, x: Any, *axes: str | None) -> Any:
    """Returns the sum over shards of an array whose other dimensions have the logical axes `axes`."""
    return x if self.shards == 1 or x is None else sum_shards(x, axes)

  def take(self, start, hidden, tokens: _Tokens):
    """Returns (index of the first token, hidden states, other token arrays) of the chunk that begins at `start`.

    Tokens that the previous chunk has too are masked.
    """
    # The last chunk ends with the tokens; those that the chunk before has too are masked.
    begin = jnp.minimum(start, self.shard_tokens - self.size)
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=begin, slice_size=self.size, axis=self.axis)
    hidden, tokens = cut(hidden), jax.tree.map(cut, tokens)
    return begin, hidden, tokens._replace(mask=jnp.where(begin + jnp.arange(self.size) >= start, tokens.mask, 0.0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(static, hidden, readout, tokens, shared):
  """Returns (weighted total, sum of each loss over all tokens), without gradients.

  JAX calls it only where no gradient is asked for, as in an evaluation; under `value_and_grad` it calls `_forward`.
  """
  functions, shards = static
  chunks = _Chunks.of(len(hidden), shards=shards, vocab=readout.kernel.shape[-1], width=0)
  hidden, tokens = chunks.split((hidden, tokens))
  readout, shared = _gathered(readout), (shared[0], None if shared[1] is None else _gathered(shared[1]))
  kernel = readout.kernel
  chunk_losses = chunks.each_shard(functools.partial(_chunk_losses, functions, shared), 0, None, 0)

  def add_chunk(sums, start):
    _, hidden_chunk, tokens_chunk = chunks.take(start, hidden, tokens)
    products = matmul(hidden_chunk.astype(kernel.dtype), kernel)
    return jax.tree.map(jnp.add, sums, chunk_losses(products, readout, tokens_chunk)), None

  total, sums = jax.lax.scan(add_chunk, _zero_sums(chunks, functions), chunks.starts())[0]
  return chunks.sum_shards(total), chunks.sum_shards(sums, None)


def _forward(static, hidden, readout, tokens, shared):
  """Returns (the result of `_total`, gradients of the weighted total with respect to `hidden` and `readout`).

  A training step runs this function. It computes the gradients in the same loop over chunks as the losses, and saves
  them for `_backward`.
  """
  functions, shards = static
  shape, width = hidden.shape, hidden.shape[1]
  chunks = _Chunks.of(len(hidden), shards=shards, vocab=readout.kernel.shape[-1], width=width)
  hidden, tokens = chunks.split((hidden, tokens))
  readout, shared = _gathered(readout), (shared[0], None if shared[1] is None else _gathered(shared[1]))
  kernel = readout.kernel
  chunk_losses = jax.value_and_grad(functools.partial(_chunk_losses, functions, shared), argnums=(0, 1), has_aux=True)
  chunk_losses = chunks.each_shard(chunk_losses, 0, None, 0)
  add_kernel_grad = chunks.each_shard(add_head_gradient, 0, 0, 0)

  def add_chunk(carry, start):
    sums, hidden_grad, kernel_grad, bias_grad = carry
    begin, hidden_chunk, tokens_chunk = chunks.take(start, hidden, tokens)
    operand = hidden_chunk.astype(kernel.dtype)
    found, (products_grad, readout_grad) = chunk_losses(matmul(operand, kernel), readout, tokens_chunk)
    # The transpose belongs in the loop, where float32 matmuls make it on the way: made before the loop, it would be a
    # second head in memory.
    new = jnp.matmul(products_grad.astype(kernel.dtype), transposed(kernel), preferred_element_type=jnp.float32)
    old = jax.lax.dynamic_slice_in_dim(hidden_grad, begin, chunks.size, axis=chunks.axis)
    new = old + new.astype(hidden_grad.dtype)
    hidden_grad = jax.lax.dynamic_update_slice_in_dim(hidden_grad, new, begin, axis=chunks.axis)
    kernel_grad = add_kernel_grad(kernel_grad, operand, products_grad)
    bias_grad = jax.tree.map(lambda total, new: total + new.astype(jnp.float32), bias_grad, readout_grad.bias)
    return (jax.tree.map(jnp.add, sums, found), hidden_grad, kernel_grad, bias_grad), None

  zero = jax.tree.map(lambda x: jnp.zeros((*chunks.lead, *x.shape), jnp.float32), (readout.kernel, readout.bias))
  carry = (_zero_sums(chunks, functions), jnp.zeros_like(hidden), *zero)
  ((total, sums), hidden_grad, kernel_grad, bias_grad), _ = jax.lax.scan(add_chunk, carry, chunks.starts())
  kernel_grad, bias_grad = chunks.sum_shards(kernel_grad, "embed", "vocab"), chunks.sum_shards(bias_grad, "vocab")
  readout_grad = dataclasses.replace(readout, kernel=kernel_grad, bias=bias_grad)
  readout_grad = jax.tree.map(lambda grad, x: grad.astype(x.dtype), readout_grad, readout)
  sums = chunks.sum_shards(total), chunks.sum_shards(sums, None)
  return sums, (hidden_grad.reshape(shape), readout_grad)


def _backward(static, saved, cotangent):
  del static
  hidden_grad, readout_grad = jax.tree.map(
    lambda grad: (cotangent[0] * grad.astype(cotangent[0].dtype)).astype(grad.dtype), saved
  )
  return hidden_grad, readout_grad, None, None


_total.defvjp(_forward, _backward)


def _zero_sums(chunks, functions):
  return jnp.zeros(chunks.lead, jnp.float32), jnp.zeros((*chunks.lead, len(functions)), jnp.float32)


def _chunk_losses(functions, shared, products, readout, tokens):
  """Returns (weighted total, sum of each loss) of one chunk, from products = hidden @ kernel [C,V]."""
  numbers, teacher_readout = shared
  target, labels, mask = tokens
  logits = readout.finish(products)[:, : readout.vocab_size]
  if teacher_readout is not None:
    target = teacher_readout.logits(target)[:, : teacher_readout.vocab_size]
  total, sums = jnp.zeros((), jnp.float32), []
  for per_token, (weight, temperature, extra) in zip(functions, numbers, strict=True):
    loss = per_token(logits, target, labels, temperature, extra)
    sums.append(jnp.sum(jnp.where(mask > 0, mask * loss, 0.0)))
    total = total + weight * sums[-1]
  return total, jnp.stack(sums)
