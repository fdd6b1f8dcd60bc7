import jax
import jax.numpy as jnp
import numpy as np

from distill.nn.gated_delta import GatedDelta, GatedDeltaConfig
from distill.nn.param import Init

CONFIG = GatedDeltaConfig(num_key_heads=2, num_value_heads=4, key_head_dim=3, value_head_dim=5)
# Positive, so that a kernel of one sign gives projections of one sign.
X = 1.0 + jax.random.uniform(jax.random.key(1), (1, 6, 8))


def mixer():
  return GatedDelta(Init(jax.random.key(0)), config=CONFIG, width=8, norm_eps=1e-5)


def prefill(module):
  run = jax.jit(lambda x: module.prefill(x, lengths=jnp.asarray([6]), length=9, dtype=jnp.float32))
  return run(X)


def test_gated_delta_with_zero_write_strength_has_zero_output_and_a_zero_state():
  module = mixer()
  module.b.kernel.set_value(jnp.full_like(module.b.kernel[...], -1e3))
  y, state = prefill(module)
  np.testing.assert_array_equal(y, 0.0)
  np.testing.assert_array_equal(state.recurrent, 0.0)


def test_neighbouring_value_heads_of_gated_delta_share_a_key_head():
  module = mixer()
  module.k.kernel.set_value(module.k.kernel[...].at[:, 3:].set(0.0))
  written = jnp.abs(prefill(module)[1].recurrent[0]).max(axis=(1, 2))
  assert (written > 0).tolist() == [True, True, False, False]


def test_the_gated_delta_decoding_state_is_float32_and_does_not_grow_with_the_text():
  short, long = (mixer().init_state(2, length=length, dtype=jnp.bfloat16) for length in (4, 4000))
  assert jax.tree.map(jnp.shape, short) == jax.tree.map(jnp.shape, long)
  assert {x.dtype for x in jax.tree.leaves(short)} == {jnp.dtype("float32")}
