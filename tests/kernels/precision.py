"""Helpers of the tests that compare kernels with their definitions, up to rounding errors."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def assert_equal_up_to_rounding(got: Any, expected: Any, *, roundings: float, dtype: Any = jnp.float32) -> None:
  """Asserts that arrays differ by at most `roundings` units of rounding of the largest number.

  Args:
    got: Arrays as the kernel returns them.
    expected: The same arrays, computed in float64.
    roundings: Roundings that a number went through, such as the length of the longest sum.
    dtype: Dtype of the rounded numbers.
  """
  unit = float(jnp.finfo(dtype).eps) / 2
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    other = np.asarray(other, np.float64)
    np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=0, atol=roundings * unit * np.abs(other).max())


def value_and_gradients(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
  """Returns (result of `function`, gradients of a sum of the result in which every number has its own weight)."""

  def loss(*arguments):
    out = function(*arguments)
    weighted = (x * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for x in jax.tree.leaves(out))
    return sum(jnp.sum(x) for x in weighted), out

  (_, out), grads = jax.jit(jax.value_and_grad(loss, range(len(arguments)), has_aux=True))(*arguments)
  return out, grads


def in_float64(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
  """Returns `value_and_gradients` of a definition as numpy arrays, with every argument and operation in float64."""
  with jax.enable_x64(True):
    found = value_and_gradients(function, *(jnp.asarray(np.asarray(x, np.float64)) for x in arguments))
  return jax.tree.map(np.asarray, found)


def segment_numbers(shape: tuple[int, int], *, share: float = 0.1) -> np.ndarray:
  """Returns segments [B,T] of random lengths, a new one with probability `share` at each position."""
  return 1 + np.cumsum(np.random.default_rng(1).random(shape) < share, axis=1)


def matmul_precisions(function: Callable[..., Any], *arguments: Any) -> set[Any]:
  """Returns the precisions that the products of `value_and_gradients` state, in loops and Pallas kernels too."""
  jaxpr = jax.make_jaxpr(lambda *arguments: value_and_gradients(function, *arguments))(*arguments)
  products = [eqn for eqn in _equations(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
  return {eqn.params["precision"] for eqn in products}


def _equations(jaxpr: Any) -> Iterator[Any]:
  """Yields the equations of a jaxpr and of every jaxpr within them."""
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
      if hasattr(inner, "eqns"):
        yield from _equations(inner)
