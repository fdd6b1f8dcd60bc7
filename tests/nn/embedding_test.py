import jax
import jax.numpy as jnp
import numpy as np

from distill.nn.embedding import Embedding
from distill.nn.param import Init


def test_tokens_of_any_shape_become_their_rows_in_float32():
  embedding = Embedding(Init(jax.random.key(0)), vocab_size=5, width=3)
  table = embedding.table[...].astype(jnp.bfloat16)
  embedding.table.set_value(table)
  for tokens in (np.asarray([4, 0]), np.asarray([[1, 1, 4]])):
    rows = embedding(jnp.asarray(tokens))
    assert rows.dtype == jnp.float32
    np.testing.assert_array_equal(rows, np.asarray(table, np.float32)[tokens])


def test_rows_are_sharded_like_the_vocabulary():
  embedding = Embedding(Init(jax.random.key(0)), vocab_size=5, width=3)
  assert embedding.table.get_metadata()["axes"] == ("vocab", "embed")
