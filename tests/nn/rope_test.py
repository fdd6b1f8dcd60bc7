import jax
import jax.numpy as jnp
import numpy as np

from distill.nn.rope import (
  DynamicNtk,
  Interpolation,
  Llama3,
  LongRope,
  RopeConfig,
  document_lengths,
  frequencies,
  rotate,
)
from tests.kernels.precision import assert_equal_up_to_rounding

PLAIN = RopeConfig()


def scores(shift, **options):
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 8))
  inverse = frequencies(8, rope=PLAIN, length=64)[0][0]
  at = [jnp.asarray([position + shift]) for position in (5, 2)]
  q, k = (rotate(x, positions=p, inverse=inverse, **options) for x, p in zip((q, k), at, strict=True))
  return jnp.sum(q * k)


def test_products_of_rotated_queries_and_keys_depend_only_on_their_distance():
  assert_equal_up_to_rounding(scores(20), scores(0), roundings=8 * 25)
  assert_equal_up_to_rounding(scores(0, factor=2.0), 4.0 * scores(0), roundings=8)


def test_rope_does_not_change_channels_past_the_rotated_fraction():
  x = jax.random.normal(jax.random.key(0), (3, 2, 8))
  inverse = frequencies(8, rope=RopeConfig(fraction=0.5), length=4)[0][0]
  y = rotate(x, positions=jnp.arange(3), inverse=inverse, factor=2.0)
  np.testing.assert_array_equal(y[..., 4:], x[..., 4:])
  assert_equal_up_to_rounding(jnp.linalg.norm(y[..., :4]), 2 * jnp.linalg.norm(x[..., :4]), roundings=32)


def test_rope_interpolation_divides_all_frequencies_and_llama_3_scaling_only_low_ones():
  plain = frequencies(64, rope=PLAIN, length=4)[0][0]
  halved = frequencies(64, rope=RopeConfig(scaling=Interpolation(factor=2.0)), length=4)[0][0]
  np.testing.assert_allclose(halved, plain / 2, rtol=1e-6)
  llama = Llama3(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=256)
  blended = frequencies(64, rope=RopeConfig(scaling=llama), length=4)[0][0]
  np.testing.assert_allclose(blended[[0, -1]], plain[[0, -1]] / [1, 8], rtol=1e-6)


def test_rope_frequencies_have_one_row_for_each_document_length_that_changes_them():
  dynamic = RopeConfig(scaling=DynamicNtk(factor=2.0, max_positions=4))
  rows, first = frequencies(8, rope=dynamic, length=6)
  assert (rows.shape, first, dynamic.by_length, PLAIN.by_length) == ((3, 4), 4, True, False)
  np.testing.assert_allclose(rows[0], frequencies(8, rope=PLAIN, length=6)[0][0], rtol=1e-6)
  long = LongRope(short=(1.0,) * 4, long=(2.0,) * 4, original_max_positions=8, attention_factor=1.5)
  (short_row, long_row), first = frequencies(8, rope=RopeConfig(scaling=long), length=9)
  np.testing.assert_allclose(long_row, short_row / 2, rtol=1e-6)
  assert first == 8 and len(frequencies(8, rope=RopeConfig(scaling=long), length=8)[0]) == 1


def test_document_lengths_returns_for_every_position_the_length_of_its_document():
  segments, positions = jnp.asarray([[1, 1, 1, 2, 2, 0]]), jnp.asarray([[0, 1, 2, 0, 1, 0]])
  assert document_lengths(segments, positions=positions)[0, :5].tolist() == [3, 3, 3, 2, 2]
