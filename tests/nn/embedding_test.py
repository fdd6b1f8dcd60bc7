import jax
import jax.numpy as jnp
import numpy as np

from distill.nn.embedding import Embedding
from distill.nn.param import Init


def test_embedding_returns_float32_table_rows_for_tokens_of_any_shape():
  embedding = Embedding(Init(jax.random.key(0)), vocab_size=5, width=3)
  table = embedding.table[...].astype(jnp.bfloat16)
  embedding.table.set_value(table)
  for tokens in (np.asarray([4, 0]), np.asarray([[1, 1, 4]])):
    rows = embedding(jnp.asarray(tokens))
    assert rows.dtype == jnp.float32
    np.testing.assert_array_equal(rows, np.asarray(table, np.float32)[tokens])


def test_embedding_rows_are_sharded_along_the_vocabulary_axis():
  embedding = Embedding(Init(jax.random.key(0)), vocab_size=5, width=3)
  assert embedding.table.get_metadata()["axes"] == ("vocab", "embed")
