"""Creates the parameters of modules. Each parameter carries logical axes, which decide how it is sharded."""

import math
import zlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

Initializer = Callable[[Key[Array, ""], tuple[int, ...]], Float[Array, "..."]]


def zeros(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
  """Initialises a parameter with zeros; the random `key` is unused."""
  return jnp.zeros(shape, jnp.float32)


def ones(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
  """Initialises a parameter with ones; the random `key` is unused."""
  return jnp.ones(shape, jnp.float32)


def normal(stddev: float) -> Initializer:
  """Returns an initialiser that draws from a normal distribution of mean 0 and standard deviation `stddev`."""
  return lambda key, shape: stddev * jax.random.normal(key, shape, jnp.float32)


def log_rate(low: float) -> Initializer:
  """Returns an initialiser of log decay rates; the rates are uniform from `low` to 16 (Dao & Gu 2024, 2405.21060)."""
  return lambda key, shape: jnp.log(jax.random.uniform(key, shape, jnp.float32, low, 16.0))


def time_step(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
  """Draws time steps, log-uniform from 0.001 to 0.1, and returns their inverse softplus.

  A mixer stores these values as its parameter `dt_bias` and applies softplus to them.
  """
  steps = jnp.exp(jax.random.uniform(key, shape, jnp.float32, math.log(1e-3), math.log(1e-1)))
  return steps + jnp.log(-jnp.expm1(-steps))


class Init:
  """Creates the parameters of one module.

  Args:
    key: Root random key. Each parameter's own key is derived from its name, so that adding a parameter does not change
      the initial values of the others.
    repeats: Number of layers whose parameters are stacked along a leading dimension 'layers'; None for a module
      without that dimension.
    scope: Dotted name of the module within the model.
  """

  def __init__(self, key: Key[Array, ""], *, repeats: int | None = None, scope: str = ""):
    self._key, self._repeats, self._scope = key, repeats, scope

  def child(self, name: str) -> "Init":
    """Returns the `Init` that creates the parameters of the child module `name`."""
    return Init(self._key, repeats=self._repeats, scope=f"{self._scope}.{name}")

  def param(self, name: str, *, shape: Sequence[int], axes: Sequence[str | None], init: Initializer) -> nnx.Param:
    """Creates a float32 parameter, with a leading dimension of layers if `repeats` was given.

    Args:
      name: Name within the module.
      shape: Shape of one layer's parameter.
      axes: Logical axis name of each dimension; None for a dimension that is never sharded.
      init: Returns the initial values for a random key and a shape.
    """
    assert len(shape) == len(axes), (self._scope, name)
    key = jax.random.fold_in(self._key, zlib.crc32(f"{self._scope}.{name}".encode()))
    if self._repeats is None:
      return nnx.Param(init(key, tuple(shape)), axes=tuple(axes))
    keys = jax.random.split(key, self._repeats)
    value = jax.vmap(lambda key: init(key, tuple(shape)))(keys)
    return nnx.Param(value, axes=("layers", *axes))
