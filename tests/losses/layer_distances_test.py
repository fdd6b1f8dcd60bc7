import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.losses import layer_distances as module
from distill.losses.layer_distances import cosine, relation_kl, relative_mse


def pair(width):
  rng = np.random.default_rng(width)
  return rng.normal(size=(2, 7, width))


def test_relative_mse_and_cosine_equal_float64_numpy():
  a, b = pair(33)
  got = relative_mse(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
  np.testing.assert_allclose(got, ((a - b) ** 2).sum(-1) / (b**2).sum(-1), rtol=1e-5)
  got = cosine(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
  np.testing.assert_allclose(got, 1 - (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1)), rtol=1e-5)


def test_relative_mse_of_a_zero_student_is_one_at_any_width():
  for width in (8, 512):
    teacher = jnp.asarray(pair(width)[0], jnp.float32)
    np.testing.assert_allclose(relative_mse(jnp.zeros_like(teacher), teacher), 1.0, rtol=1e-5)


def relations(x, segments, heads):
  """Returns softmax(a aᵀ / √H) of each relation head in float64, causal and within segments: [B, N, T, T]."""
  length = x.shape[1]
  x = x.reshape(*x.shape[:2], heads, -1)
  scores = np.einsum("btnh,bsnh->bnts", x, x) / np.sqrt(x.shape[-1])
  seen = (np.arange(length)[:, None] >= np.arange(length)) & (segments[:, :, None] == segments[:, None])
  scores = np.where(seen[:, None], scores, -np.inf)
  exp_scores = np.exp(scores - scores.max(-1, keepdims=True))
  return exp_scores / exp_scores.sum(-1, keepdims=True)


@pytest.mark.parametrize("block", [4, 5, 128])
def test_relation_kl_of_models_with_different_widths_equals_float64_numpy(block, monkeypatch):
  monkeypatch.setattr(module, "_BLOCK_QUERIES", block)
  rng = np.random.default_rng(0)
  student, teacher = rng.normal(size=(2, 11, 12)), rng.normal(size=(2, 11, 20))
  segments = np.asarray([[1] * 6 + [2] * 5, [1] * 8 + [0] * 3])
  p, q = (relations(x, segments, 4) for x in (teacher, student))
  expected = np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(p > 0, q, 1)), 0), axis=-1).mean(1)
  mine, theirs = (jnp.asarray(x, jnp.float32) for x in (student, teacher))

  def total(mine, segments):
    return jnp.sum(relation_kl(mine, theirs, segments=segments, heads=4))

  found = relation_kl(mine, theirs, segments=jnp.asarray(segments), heads=4)
  np.testing.assert_allclose(found, expected, atol=1e-6)
  # The slope along one direction, against a difference quotient of the oracle.
  direction, step = rng.normal(size=student.shape), 1e-5

  def oracle(x):
    q = relations(x, segments, 4)
    return np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(p > 0, q, 1)), 0)) / 4

  slope = (oracle(student + step * direction) - oracle(student - step * direction)) / (2 * step)
  got = np.sum(np.asarray(jax.grad(total)(mine, jnp.asarray(segments)), np.float64) * direction)
  np.testing.assert_allclose(got, slope, rtol=1e-4)


def test_rotating_each_head_of_the_student_does_not_change_its_relations():
  rng = np.random.default_rng(0)
  teacher = rng.normal(size=(1, 9, 8))
  turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
  student = (teacher.reshape(1, 9, 2, 4) @ turn).reshape(1, 9, 8)
  mine, theirs = (jnp.asarray(x, jnp.float32) for x in (student, teacher))
  segments = jnp.ones((1, 9), jnp.int32)
  np.testing.assert_allclose(relation_kl(mine, theirs, segments=segments, heads=2), 0.0, atol=1e-6)
  assert jnp.max(relation_kl(mine, theirs, segments=segments, heads=4)) > 0.01
