"""Makes parameters: shape, logical axes and initialiser, from which sharding, loading and export follow."""

import math
import zlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

Initializer = Callable[[Key[Array, ""], tuple[int, ...]], Float[Array, "..."]]


def zeros(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
  """Initialises a parameter with zeros; the key is unused."""
  return jnp.zeros(shape, jnp.float32)


def ones(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
  """Initialises a parameter with ones; the key is unused."""
  return jnp.ones(shape, jnp.float32)


def normal(stddev: float) -> Initializer:
  """Returns an initialiser that draws from a normal distribution of mean 0 and standard deviation `stddev`."""
  return lambda key, shape: stddev * jax.random.normal(key, shape, jnp.float32)


def log_rate(low: float) -> Initializer:
  """Returns an initialiser of log decay rates; rates are uniform from `low` to 16 (Dao & Gu 2024, 2405.21060)."""
  return lambda key, shape: jnp.log(jax.random.uniform(key, shape, jnp.float32, low, 16.0))


def time_step(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
  """Draws inverse-softplus time steps; steps are log-uniform from 0.001 to 0.1, a memory of tens of positions."""
  steps = jnp.exp(jax.random.uniform(key, shape, jnp.float32, math.log(1e-3), math.log(1e-1)))
  return steps + jnp.log(-jnp.expm1(-steps))


class Init:
  """Makes the parameters of a module.

  Args:
    key: Root key. The key of a parameter follows from its name, so that a new parameter changes no other.
    repeats: Size of a leading dimension 'layers' of every parameter; None for a single layer.
    scope: Dotted name of the module.
  """

  def __init__(self, key: Key[Array, ""], *, repeats: int | None = None, scope: str = ""):
    self._key, self._repeats, self._scope = key, repeats, scope

  def child(self, name: str) -> "Init":
    """Returns the maker for a child module."""
    return Init(self._key, repeats=self._repeats, scope=f"{self._scope}.{name}")

  def param(self, name: str, *, shape: Sequence[int], axes: Sequence[str | None], init: Initializer) -> nnx.Param:
    """Makes a float32 parameter.

    Args:
      name: Name within the module.
      shape: Shape of one layer's parameter.
      axes: Logical axis name of each dimension; None for a dimension that is never sharded.
      init: Initialiser.
    """
    assert len(shape) == len(axes), (self._scope, name)
    key = jax.random.fold_in(self._key, zlib.crc32(f"{self._scope}.{name}".encode()))
    if self._repeats is None:
      return nnx.Param(init(key, tuple(shape)), axes=tuple(axes))
    keys = jax.random.split(key, self._repeats)
    value = jax.vmap(lambda key: init(key, tuple(shape)))(keys)
    return nnx.Param(value, axes=("layers", *axes))
