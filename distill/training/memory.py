"""Chooses, among equivalent training steps, the fastest whose compiled program fits into device memory."""

import math
import os
import re
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
  devices = {device.platform for one in jax.tree.leaves(compiled.input_shardings) for device in one.device_set}
  # The peak counts what is alive at the same time. On a CPU (jaxlib 0.10.2) it leaves temporaries out.
  if "cpu" not in devices and found.peak_memory_in_bytes:
    return found.peak_memory_in_bytes
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
    compiled, size = compile_within(step.lower(*arguments))  # type: ignore[attr-defined]
    if compiled is not None and size <= limit:
      return step
    report(
      f"the training step needs {size / 2**30:.1f} GiB a device, which has {limit / 2**30:.1f} GiB; trying a step that "
      "saves fewer activations, which are recomputed"
    )
  return steps[-1]


def compile_within(lowered: Any) -> tuple[Any, float]:
  """Compiles a lowered function; returns (the program, the bytes that it needs on one device).

  The program is None where the compiler itself finds that it exceeds the device's memory, as the TPU compiler does; the
  size is then what the compiler says, or infinite if it says nothing.
  """
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    used = re.search(r"Used ([\d.]+)([KMGT]) of", str(error))
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return None, float(used[1]) * units[used[2]] if used else math.inf
  return compiled, needed(compiled)
