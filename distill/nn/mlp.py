"""Gated multi-layer perceptron."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from distill.nn.linear import Linear
from distill.nn.param import Init


class GatedMlp(nnx.Module):
  """down(silu(gate(x)) * up(x)) (Shazeer 2020, 2002.05202)."""

  def __init__(self, init: Init, *, width: int, hidden: int, use_bias: bool = False):
    wide, narrow = ("embed", "mlp"), ("mlp", "embed")
    self.gate = Linear(init.child("gate"), shape=(width, hidden), axes=wide, use_bias=use_bias)
    self.up = Linear(init.child("up"), shape=(width, hidden), axes=wide, use_bias=use_bias)
    self.down = Linear(init.child("down"), shape=(hidden, width), axes=narrow, use_bias=use_bias)

  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """The MLP, in x's dtype."""
    return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
