"""Embedding of token ids or positions."""

from flax import nnx
from jaxtyping import Array, Float, Int

from distill.axes.logical import constrain
from distill.nn.matrix import as_matrix
from distill.nn.param import Init, normal


class Embedding(nnx.Module):
  """A table with one row [D] for each token id, or for each position.

  Args:
    init: Creates the parameters of the module.
    vocab_size: Number of rows V.
    width: Model width D.
  """

  def __init__(self, init: Init, *, vocab_size: int, width: int):
    self.table = init.param("table", shape=(vocab_size, width), axes=("vocab", "embed"), init=normal(0.02))

  def __call__(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    """Returns the table row of each token id or position, float32."""
    rows = as_matrix(self.table.get_value()).take(tokens)
    # Divided as the table is. The gradient then travels to the part of the table that it belongs to; else XLA adds up a
    # whole table on every device, and sums that over all devices.
    return constrain(rows, ("replica", *[None] * (rows.ndim - 2), "embed"))
