"""How annotations are checked while the tests run."""

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function):
  """Checks the arguments and results of every call, but for constructors: JAX rebuilds values with placeholders."""
  return function if function.__qualname__.endswith(".__init__") else _check(function)
