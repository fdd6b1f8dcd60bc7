"""Distances between hidden states."""

import jax.numpy as jnp
from jaxtyping import Array, Float

_EPS = 1e-6


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
