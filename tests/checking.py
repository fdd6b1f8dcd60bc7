"""Checks type annotations of the library at run time while the tests run."""

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function):
  """Wraps a function to check its arguments and results by their annotations.

  Constructors are not checked, because JAX rebuilds pytrees with placeholders.
  """
  return function if function.__qualname__.endswith(".__init__") else _check(function)
