import jax.numpy as jnp
import numpy as np

from distill.losses.hidden import cosine, relative_mse


def pair(width):
  rng = np.random.default_rng(width)
  return rng.normal(size=(2, 7, width))


def test_distances_equal_float64_numpy():
  a, b = pair(33)
  got = relative_mse(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
  np.testing.assert_allclose(got, ((a - b) ** 2).sum(-1) / (b**2).sum(-1), rtol=1e-5)
  got = cosine(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
  np.testing.assert_allclose(got, 1 - (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1)), rtol=1e-5)


def test_a_zero_student_costs_one_at_any_width():
  for width in (8, 512):
    teacher = jnp.asarray(pair(width)[0], jnp.float32)
    np.testing.assert_allclose(relative_mse(jnp.zeros_like(teacher), teacher), 1.0, rtol=1e-5)
