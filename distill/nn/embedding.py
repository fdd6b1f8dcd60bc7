"""Embeddings of tokens and positions."""

from flax import nnx
from jaxtyping import Array, Float, Int

from distill.nn.matrix import as_matrix
from distill.nn.param import Init, normal


class Embedding(nnx.Module):
  """A table with one row for each token."""

  def __init__(self, init: Init, *, vocab_size: int, width: int):
    self.table = init.param("table", shape=(vocab_size, width), axes=("vocab", "embed"), init=normal(0.02))

  def __call__(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    """Returns the rows of `tokens`, float32."""
    return as_matrix(self.table.get_value()).take(tokens)
