"""The one projection that everything goes through."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from distill.nn.matrix import project
from distill.nn.param import Init, Initializer, normal, zeros

# What projections give, for a policy of what the backward pass finds and what it computes again.
PROJECTION = "projection"


class Linear(nnx.Module):
  """x @ kernel (+ bias), with operands in x's dtype and a float32 sum.

  Args:
    init: Maker of the parameters.
    shape: (in, out).
    axes: Logical axes of (in, out).
    use_bias: Whether a bias is added.
    kernel_init: Default: normal of 1 / sqrt(in).
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
    """The projection, in x's dtype or in `out`."""
    # Two-dimensional operands: XLA's CPU backward pass of the same product over [B, T, I] takes 2.5 times as long.
    rows = x.reshape(-1, x.shape[-1])
    y = project(rows, self.kernel.get_value())
    if self.bias is not None:
      y = y + self.bias[...].astype(jnp.float32)
    return _named(y.astype(out or x.dtype).reshape(*x.shape[:-1], -1))


@jax.custom_vjp
def _named(y):
  """y under the name of a projection; bfloat16 is kept as bits, for XLA's CPU code would slice it as float32."""
  return _named_forward(y)[0]


def _named_forward(y):
  if y.dtype != jnp.bfloat16:
    return checkpoint_name(y, PROJECTION), None
  bits = checkpoint_name(jax.lax.bitcast_convert_type(y, jnp.uint16), PROJECTION)
  return jax.lax.bitcast_convert_type(bits, jnp.bfloat16), None


def _named_backward(_, cotangent):
  return (cotangent,)


_named.defvjp(_named_forward, _named_backward)
