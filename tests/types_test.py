import jax
import jax.numpy as jnp
import numpy as np

from distill.types import NO_CAPTURE, Capture, DenseSignal, Readout, SparseSignal, SparseTarget


def test_readout_logits_equal_the_plain_formula_and_padded_ids_get_no_probability():
  rng = np.random.default_rng(0)
  hidden, kernel = rng.normal(size=(2, 3, 8)), rng.normal(size=(8, 13))
  bias = rng.normal(size=13)
  readout = Readout(
    kernel=jnp.asarray(kernel, jnp.float32), bias=jnp.asarray(bias, jnp.float32), softcap=4.0, scale=0.7, vocab_size=11
  )
  logits = readout.logits(jnp.asarray(hidden, jnp.float32))
  expected = 4.0 * np.tanh((hidden @ kernel + bias) * 0.7 / 4.0)
  np.testing.assert_allclose(logits[..., :11], expected[..., :11], rtol=1e-5, atol=1e-6)
  assert (jax.nn.softmax(logits)[..., 11:] == 0).all()


def test_the_union_of_captures_has_each_layer_number_once_in_ascending_order():
  union = Capture(layers=(3, -1), mixers=(2,)) | Capture(layers=(0, 3), qkv=(1,)) | NO_CAPTURE
  assert union == Capture(layers=(-1, 0, 3), mixers=(2,), qkv=(1,))
  assert hash(union) == hash(Capture(layers=(0, 3, -1), mixers=(2,), qkv=(1,)))


def test_target_rows_flattens_the_batch_and_positions_of_dense_and_sparse_signals():
  readout = Readout(kernel=jnp.ones((4, 7)), vocab_size=7)
  hidden, found = DenseSignal(hidden=jnp.ones((2, 3, 4)), readout=readout).target_rows()
  assert hidden.shape == (6, 4) and found is readout
  target = SparseTarget(ids=jnp.zeros((2, 3, 5), int), log_probs=jnp.zeros((2, 3, 5)), tail=jnp.zeros((2, 3)))
  rows, found = SparseSignal(target=target).target_rows()
  assert (rows.ids.shape, rows.tail.shape, found) == ((6, 5), (6,), None)
