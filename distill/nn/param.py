"""One description of a parameter: shape, logical axes, initialiser; sharding, loading and export follow from it."""

import math
import zlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

Initializer = Callable[[Key[Array, ""], tuple[int, ...]], Float[Array, "..."]]


def zeros(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
  """All zero."""
  return jnp.zeros(shape, jnp.float32)


def ones(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
  """All one."""
  return jnp.ones(shape, jnp.float32)


def normal(stddev: float) -> Initializer:
  """Gaussian of the given standard deviation."""
  return lambda key, shape: stddev * jax.random.normal(key, shape, jnp.float32)


def log_rate(low: float) -> Initializer:
  """Logarithm of decay rates uniform from `low` to 16 (Dao & Gu 2024, 2405.21060)."""
  return lambda key, shape: jnp.log(jax.random.uniform(key, shape, jnp.float32, low, 16.0))


def time_step(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
  """Inverse softplus of time steps log-uniform from 0.001 to 0.1: a fresh layer remembers tens of positions."""
  steps = jnp.exp(jax.random.uniform(key, shape, jnp.float32, math.log(1e-3), math.log(1e-1)))
  return steps + jnp.log(-jnp.expm1(-steps))


class Init:
  """Makes the parameters of a module, each with a key of its own name, stacked over `repeats` layers if asked.

  Args:
    key: Root key; a parameter's key is folded in from its name, so adding one leaves the others as they were.
    repeats: Leading 'layers' dimension of every parameter, or None for a single layer.
  """

  def __init__(self, key: Key[Array, ""], *, repeats: int | None = None, scope: str = ""):
    self._key, self._repeats, self._scope = key, repeats, scope

  def child(self, name: str) -> "Init":
    """The same maker, one level down the tree of names."""
    return Init(self._key, repeats=self._repeats, scope=f"{self._scope}.{name}")

  def param(self, name: str, *, shape: Sequence[int], axes: Sequence[str | None], init: Initializer) -> nnx.Param:
    """A float32 parameter of `shape` with one logical axis name (or None) a dimension."""
    assert len(shape) == len(axes), (self._scope, name)
    key = jax.random.fold_in(self._key, zlib.crc32(f"{self._scope}.{name}".encode()))
    if self._repeats is None:
      return nnx.Param(init(key, tuple(shape)), axes=tuple(axes))
    keys = jax.random.split(key, self._repeats)
    value = jax.vmap(lambda key: init(key, tuple(shape)))(keys)
    return nnx.Param(value, axes=("layers", *axes))
