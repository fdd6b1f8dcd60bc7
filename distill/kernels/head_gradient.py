"""The gradient of a language-model head, summed over chunks of tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from distill.kernels.matmul import transposed
from distill.kernels.saved_bits import as_bits

_BLOCK_BYTES = 8 * 2**20
_MIN_COLUMNS = 128
# Columns per block are a multiple of the width of a vector register.
_LANES = 16


def add_head_gradient(
  total: Float[Array, "D V"], hidden: Float[Array, "C D"], logits_grad: Float[Array, "C V"]
) -> Float[Array, "D V"]:
  """Adds the head gradient of one chunk of tokens: total + hiddenᵀ @ logits_grad.

  On a CPU the columns are added in blocks of about 8 MiB, each of which stays in the CPU's cache until it is added.

  Args:
    total: Sum of the head gradients of the previous chunks, float32.
    hidden: Hidden states of the chunk, in the dtype of the matmul.
    logits_grad: Gradient of the chunk's logits; rounded to the dtype of `hidden`.

  Returns:
    The sum including this chunk, float32.
  """
  operands = total, transposed(hidden, left=True), logits_grad.astype(hidden.dtype)
  return jax.lax.platform_dependent(*operands, cpu=_in_blocks, default=_at_once)


def add_head_gradient_reference(
  total: Float[Array, "D V"], hidden: Float[Array, "C D"], logits_grad: Float[Array, "C V"]
) -> Float[Array, "D V"]:
  """Computes `add_head_gradient` by its definition, in the dtype of the operands.

  Args: as `add_head_gradient`.
  """
  return total + hidden.T @ logits_grad


def _at_once(total_DV, hidden_DC, grad_CV):
  return total_DV + jnp.matmul(hidden_DC, grad_CV, preferred_element_type=jnp.float32)


def _in_blocks(total_DV, hidden_DC, grad_CV):
  width, vocab = total_DV.shape
  blocks = -(-vocab // max(_MIN_COLUMNS, _BLOCK_BYTES // (4 * width)))
  if blocks == 1:
    # Workaround: XLA (jaxlib 0.10.2) inlines a loop of one step too late, after the pass that widens bfloat16 operands.
    # On several CPU devices the matmul then fails with "Unsupported element type for DotThunk: BF16 x BF16 = F32".
    return _at_once(total_DV, hidden_DC, grad_CV)
  size = min(vocab, -(-vocab // (blocks * _LANES)) * _LANES)
  # Workaround: the CPU code of XLA (jaxlib 0.10.2) converts all of a bfloat16 array to float32 before it slices it.
  grad_CV = as_bits(grad_CV)

  def add(i, total_DV):
    # The last block ends with the columns; a block of another size would be added in a copy of the total.
    begin = jnp.minimum(i * size, vocab - size)
    old, grad = (jax.lax.dynamic_slice_in_dim(x, begin, size, axis=1) for x in (total_DV, grad_CV))
    if size * blocks != vocab:
      # Columns of the block before are masked, so that they are not added twice.
      grad = jnp.where(begin + jnp.arange(size) >= i * size, grad, 0)
    new = _at_once(old, hidden_DC, jax.lax.bitcast_convert_type(grad, hidden_DC.dtype))
    return jax.lax.dynamic_update_slice_in_dim(total_DV, new, begin, axis=1)

  return jax.lax.fori_loop(0, blocks, add, total_DV)
