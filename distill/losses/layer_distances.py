"""Distances between hidden states."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_EPS = 1e-6
# Positions whose relations are compared at once: [B, R, C, T] of both models is what there is of [B, R, T, T].
_BLOCK = 128


def relative_mse(student: Float[Array, "*B D"], teacher: Float[Array, "*B D"]) -> Float[Array, "*B"]:
  """‖student − teacher‖² / ‖teacher‖² per token: 0 when equal, 1 for a zero student, whatever the width."""
  student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
  error = jnp.sum(jnp.square(student - teacher), axis=-1)
  return error / (jnp.sum(jnp.square(teacher), axis=-1) + _EPS)


def cosine(student: Float[Array, "*B D"], teacher: Float[Array, "*B D"]) -> Float[Array, "*B"]:
  """1 − cos(student, teacher) per token, between 0 and 2."""
  student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
  dot = jnp.sum(student * teacher, axis=-1)
  norms = jnp.sum(jnp.square(student), axis=-1) * jnp.sum(jnp.square(teacher), axis=-1)
  return 1.0 - dot / jnp.sqrt(norms + _EPS)


def relation_kl(
  student: Float[Array, "B T I"], teacher: Float[Array, "B T J"], *, segments: Int[Array, "B T"], heads: int
) -> Float[Array, "B T"]:
  """KL(teacher ‖ student) of the relations of each position to those before it, mean over relation heads.

  A relation is softmax(a aᵀ / √h) within a document and causal, of queries, keys or values a of all heads side by side,
  cut into `heads` relation heads of width h, so that head counts of the models need not match (MiniLMv2, 2012.15828,
  section 3.1). Both widths must be multiples of `heads`.
  """
  length = student.shape[1]
  size = min(_BLOCK, length)
  count = -(-length // size)

  def split(x):
    """[B,T,I] -> [B,R,T,H], scaled so that products are scores."""
    x = x.astype(jnp.float32).reshape(*x.shape[:2], heads, -1)
    return jnp.moveaxis(x, 2, 1) * x.shape[-1] ** -0.25

  def block(start):
    """[B,C] from position `start` on."""

    def relations(x_BRTH):
      rows = jax.lax.dynamic_slice_in_dim(x_BRTH, start, size, axis=2)
      scores = jnp.einsum("brch,brth->brct", rows, x_BRTH)
      return jax.nn.log_softmax(jnp.where(seen[:, None], scores, jnp.finfo(jnp.float32).min), axis=-1)

    here = jax.lax.dynamic_slice_in_dim(segments, start, size, axis=1)
    causal = start + jnp.arange(size)[:, None] >= jnp.arange(length)
    seen = causal & (here[:, :, None] == segments[:, None, :])
    p, q = (jnp.where(seen[:, None], relations(x), 0.0) for x in (theirs, mine))
    divergence = jnp.sum(jnp.where(seen[:, None], jnp.exp(p) * (p - q), 0.0), axis=-1)
    return jnp.mean(divergence, axis=1)

  mine, theirs = split(student), split(teacher)
  # The last block ends where the row does.
  starts = jnp.minimum(jnp.arange(count) * size, length - size)
  found = jax.lax.map(jax.checkpoint(block), starts)
  places = (starts[:, None] + jnp.arange(size)).reshape(-1)
  return (
    jnp.zeros(student.shape[:2], jnp.float32).at[:, places].set(jnp.moveaxis(found, 0, 1).reshape(len(student), -1))
  )
