"""Chooses, among equivalent training steps, the fastest whose compiled program fits into device memory."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax

Step = Callable[..., Any]


def device_memory() -> int:
  """Returns the memory capacity of one local device in bytes; virtual devices share the host's memory equally."""
  device = jax.local_devices()[0]
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"]
  return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()


def needed(compiled: Any) -> int:
  """Returns the bytes that a compiled computation needs on one device: arguments, results and temporaries."""
  found = compiled.memory_analysis()
  results = found.output_size_in_bytes - found.alias_size_in_bytes
  return found.argument_size_in_bytes + results + found.temp_size_in_bytes


def first_that_fits(steps: Sequence[Step], *, report: Callable[[str], None]) -> Step:
  """Returns a function that, on its first call, chooses the first of `steps` that fits into device memory.

  If none fits, it chooses the last. All calls run the chosen step, which is compiled only once.

  Args:
    steps: Jitted training steps with equal results, from the fastest to the one that needs least memory.
    report: Called with one line of text for each step that does not fit.
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
    report(
      f"the training step needs {size / 2**30:.1f} GiB a device, which has {limit / 2**30:.1f} GiB; trying a step that "
      "saves fewer activations, which are recomputed"
    )
  return steps[-1]
