"""Steps that fit the memory of the devices."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax

Step = Callable[..., Any]


def device_memory() -> int:
  """Bytes of one device of this process; of virtual ones, which share the host's, an equal part."""
  device = jax.local_devices()[0]
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"]
  return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()


def needed(compiled: Any) -> int:
  """Bytes that a compiled computation needs on one device: what it is given, what it makes, and what lies between."""
  found = compiled.memory_analysis()
  made = found.output_size_in_bytes - found.alias_size_in_bytes
  return found.argument_size_in_bytes + made + found.temp_size_in_bytes


def first_that_fits(steps: Sequence[Step], *, report: Callable[[str], None]) -> Step:
  """The first of several jitted steps, the fastest before the leanest, that its compiler says will fit; else the last.

  It is chosen at the first call, on the arguments of that one; the compiled program is the one that runs.
  """
  chosen: list[Step] = []

  def step(*arguments: Any) -> Any:
    if not chosen:
      chosen.append(_choose(steps, arguments, report))
    return chosen[0](*arguments)

  return step


def _choose(steps: Sequence[Step], arguments: Sequence[Any], report: Callable[[str], None]) -> Step:
  limit = device_memory()
  for step in steps[:-1]:
    size = needed(step.lower(*arguments).compile())  # type: ignore[attr-defined]
    if size <= limit:
      return step
    report(f"the step needs {size / 2**30:.1f} GiB a device of {limit / 2**30:.1f}: more is computed again")
  return steps[-1]
