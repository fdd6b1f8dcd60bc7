"""Distances between layers of student and teacher: of hidden states, and of queries, keys or values."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_EPS = 1e-6
# Query positions whose relations are compared at once, so that only [B, N, C, T] of the [B, N, T, T] relations exist.
_BLOCK_QUERIES = 128


def relative_mse(student: Float[Array, "*B D"], teacher: Float[Array, "*B D"]) -> Float[Array, "*B"]:
  """Computes ‖student − teacher‖² / ‖teacher‖² per token: 0 if equal, 1 if the student is all zeros."""
  student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
  error = jnp.sum(jnp.square(student - teacher), axis=-1)
  return error / (jnp.sum(jnp.square(teacher), axis=-1) + _EPS)


def cosine(student: Float[Array, "*B D"], teacher: Float[Array, "*B D"]) -> Float[Array, "*B"]:
  """Computes 1 − cos(student, teacher) per token, between 0 and 2."""
  student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
  dot = jnp.sum(student * teacher, axis=-1)
  norms = jnp.sum(jnp.square(student), axis=-1) * jnp.sum(jnp.square(teacher), axis=-1)
  return 1.0 - dot / jnp.sqrt(norms + _EPS)


def relation_kl(
  student: Float[Array, "B T I"], teacher: Float[Array, "B T teacher_I"], *, segments: Int[Array, "B T"], heads: int
) -> Float[Array, "B T"]:
  """Computes KL(teacher ‖ student) between the relations of each position, averaged over relation heads.

  The relations of a layer are softmax(a aᵀ / √H), causal and within each segment. Here a is the queries, keys or values
  of the layer, concatenated over its heads and split again into N relation heads of width H. Student and teacher may
  therefore have different numbers and widths of heads.

  Args:
    student: The student's queries, keys or values; their width I is a multiple of `heads`.
    teacher: The teacher's queries, keys or values; their width is a multiple of `heads` too.
    segments: Segment number of each position.
    heads: Number of relation heads N.

  Returns:
    The divergence of each position, float32.

  References:
    Wang et al. 2020 (MiniLMv2), 2012.15828, section 3.1.
  """
  length = student.shape[1]
  size = min(_BLOCK_QUERIES, length)
  count = -(-length // size)
  student_BNTH, teacher_BNTH = _relation_heads(student, heads), _relation_heads(teacher, heads)

  def block(start):
    """Returns the divergences [B,C] at C positions from `start` on, where C is `size`."""
    here = jax.lax.dynamic_slice_in_dim(segments, start, size, axis=1)
    causal = (start + jnp.arange(size))[None, :, None] >= jnp.arange(length)[None, None, :]
    mask = (causal & (here[:, :, None] == segments[:, None, :]))[:, None]

    def log_relations(x_BNTH):
      rows = jax.lax.dynamic_slice_in_dim(x_BNTH, start, size, axis=2)
      scores = jnp.einsum("bnch,bnth->bnct", rows, x_BNTH)
      return jax.nn.log_softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1)

    log_p, log_q = (jnp.where(mask, log_relations(x), 0.0) for x in (teacher_BNTH, student_BNTH))
    divergence = jnp.sum(jnp.where(mask, jnp.exp(log_p) * (log_p - log_q), 0.0), axis=-1)
    return jnp.mean(divergence, axis=1)

  # The last block ends with the row and may overlap its predecessor; both give the same numbers there.
  starts = jnp.minimum(jnp.arange(count) * size, length - size)
  found = jax.lax.map(jax.checkpoint(block), starts)
  positions = (starts[:, None] + jnp.arange(size)[None, :]).reshape(-1)
  divergences = jnp.moveaxis(found, 0, 1).reshape(len(student), -1)
  return jnp.zeros(student.shape[:2], jnp.float32).at[:, positions].set(divergences)


def _relation_heads(x, heads):
  """Reshapes x [B,T,I] to [B,N,T,H] and multiplies it by H^−¼, so that dot products are divided by √H."""
  x = x.astype(jnp.float32).reshape(*x.shape[:2], heads, -1)
  return jnp.moveaxis(x, 2, 1) * x.shape[-1] ** -0.25
