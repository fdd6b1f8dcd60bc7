import jax
import jax.numpy as jnp
import numpy as np

from distill.types import Readout


def test_readout_equals_the_plain_formula_and_padding_gets_no_probability():
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
