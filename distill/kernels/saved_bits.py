"""Saves bfloat16 arrays for the backward pass as their bits, because a CPU would convert them to float32."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Shaped


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def saved_as_bits(x: Float[Array, "*B"], name: str) -> Float[Array, "*B"]:
  """Returns x, tagged with `name` for a remat policy; bfloat16 values are tagged and saved as their bits.

  Workaround: where a scan stacks saved bfloat16 values, the CPU code of XLA (jaxlib 0.10.2) converts the whole stack
  to float32 before it slices it. It slices integers as they are.

  Args:
    x: An intermediate value of the forward pass.
    name: The tag, as in `jax.ad_checkpoint.checkpoint_name`.
  """
  return _forward(x, name)[0]


def saved_as_bits_reference(x: Float[Array, "*B"], name: str) -> Float[Array, "*B"]:
  """Computes `saved_as_bits` by its definition: tags x as it is, without a conversion to bits."""
  return checkpoint_name(x, name)


def _forward(x, name):
  if x.dtype != jnp.bfloat16:
    return checkpoint_name(x, name), None
  return jax.lax.bitcast_convert_type(checkpoint_name(as_bits(x), name), jnp.bfloat16), None


def _backward(name, saved, cotangent):
  del name, saved
  return (cotangent,)


saved_as_bits.defvjp(_forward, _backward)


def as_bits(x: Float[Array, "*B"]) -> Shaped[Array, "*B"]:
  """Returns the bits of a bfloat16 array as uint16, and any other array as it is."""
  return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x
