"""The linear projection that all layers use."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from distill.kernels.saved_bits import saved_as_bits
from distill.nn.matrix import as_matrix
from distill.nn.param import Init, Initializer, normal, zeros

# Tag of the outputs of projections, for remat policies.
PROJECTION = "projection"


class Linear(nnx.Module):
  """A linear projection: x @ kernel (+ bias), with operands in x's dtype and float32 sums.

  Args:
    init: Creates the parameters of the module.
    shape: Input and output width (I, O).
    axes: Logical axes of the input and the output, which decide how the kernel is sharded.
    use_bias: Adds a bias.
    kernel_init: Initialiser of the kernel; by default a normal distribution of standard deviation 1 / sqrt(I).
  """

  def __init__(
    self,
    init: Init,
    *,
    shape: tuple[int, int],
    axes: tuple[str | None, str | None],
    use_bias: bool = False,
    kernel_init: Initializer | None = None,
  ):
    kernel_init = kernel_init or normal(shape[0] ** -0.5)
    self.kernel = init.param("kernel", shape=shape, axes=axes, init=kernel_init)
    self.bias = init.param("bias", shape=shape[1:], axes=axes[1:], init=zeros) if use_bias else None

  def __call__(self, x: Float[Array, "*B I"], *, out: DTypeLike | None = None) -> Float[Array, "*B O"]:
    """Projects x; the result has the dtype `out`, or that of x if `out` is None."""
    # Flattened to two dimensions: the backward pass over [B, T, I] takes 2.5 times as long in XLA's CPU code (jaxlib
    # 0.10.2).
    rows = x.reshape(-1, x.shape[-1])
    y = as_matrix(self.kernel.get_value()).project(rows)
    if self.bias is not None:
      y = y + self.bias[...].astype(jnp.float32)[None, :]
    return saved_as_bits(y.astype(out or x.dtype).reshape(*x.shape[:-1], -1), PROJECTION)
