"""What a traced program holds: the precision of its products."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def matmul_precisions(function: Callable[..., Any], *arguments: Any) -> set[str]:
  """Returns the names of the precisions of all products of float32 operands that `function` is traced to."""
  found = set()
  for equation in _equations(jax.make_jaxpr(function)(*arguments).jaxpr):
    if equation.primitive.name == "dot_general" and equation.invars[0].aval.dtype == "float32":
      precision = equation.params["precision"]
      found |= {x.name for x in precision} if isinstance(precision, tuple) else {str(precision)}
  return found


def _equations(jaxpr: Jaxpr) -> Iterator[Any]:
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)):
      if isinstance(inner, ClosedJaxpr | Jaxpr):
        yield from _equations(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)
