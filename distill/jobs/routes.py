"""Reads the teacher's stack of adapters, and which of them teach the rows of each data source."""

import pathlib
from collections.abc import Sequence

from distill.adapters.stack import Stack, read_stack, stack_of
from distill.data.config import SourceConfig
from distill.errors import InputError
from distill.teachers.config import TeacherConfig

# The adapters that teach the rows of a data source; None for the whole stack.
Route = tuple[str, ...] | None


def routes(sources: Sequence[SourceConfig]) -> tuple[list[Route], list[int]]:
  """Returns (list of the sources' distinct routes, for each source the index of its route in this list).

  A route names the adapters that teach a source's rows. An empty route is the base alone. The route of a source that
  sets no `adapters` is None: the whole stack teaches it.
  """
  found: list[Route] = []
  places = []
  for source in sources:
    route = None if source.adapters is None else tuple(sorted(set(source.adapters)))
    if route not in found:
      found.append(route)
    places.append(found.index(route))
  return found, places


def stack(teacher: TeacherConfig) -> Stack:
  """Returns the teacher's stack of adapters, from its list `adapters` or its file `adapter_stack`.

  Raises:
    InputError: Both the list and the file are given, or the file is wrong.
  """
  if teacher.adapters and teacher.adapter_stack:
    raise InputError("config.teacher: adapters and adapter_stack are both set; set only one of them")
  return read_stack(pathlib.Path(teacher.adapter_stack)) if teacher.adapter_stack else stack_of(teacher.adapters)


def chosen(stack: Stack, route: Route) -> list[int]:
  """Returns the ascending indices of a route's adapters in the stack; of all adapters if the route is None.

  Raises:
    InputError: The route names an adapter that is missing or ambiguous.
  """
  if route is None:
    return list(range(len(stack)))
  names = [entry.name for entry in stack]
  for name in route:
    if names.count(name) != 1:
      problem = (
        "belongs to several adapters"
        if name in names
        else f"is not in the teacher's stack ({', '.join(names) or 'empty'})"
      )
      raise InputError(
        f"config.data.sources: the adapter name {name!r} {problem}; name an adapter by the last part of its path, or "
        "by its 'name' in the stack file"
      )
  return [place for place, name in enumerate(names) if name in route]
