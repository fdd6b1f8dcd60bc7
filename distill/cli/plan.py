"""distill plan: compiles a recipe's step for described devices, and prints memory, time and cost."""

import sys
from collections.abc import Sequence

from absl import flags

from distill.cli import configuration
from distill.cli.parsing import parse
from distill.jobs.plan import Plan, plan

FLAGS = flags.FlagValues()
_CONFIG = flags.DEFINE_string(
  "config", None, "FILE.py or FILE.py:variant; --config.path.to.key=value overrides.", required=True, flag_values=FLAGS
)
_TOPOLOGY = flags.DEFINE_multi_string(
  "topology",
  None,
  "Chip and torus, as v5p:4x4x4, or 2*v5p:8x8x8 for two slices; give the flag again for another.",
  required=True,
  flag_values=FLAGS,
)
_STAGE = flags.DEFINE_string("stage", "", "Name of one stage; all stages without it.", flag_values=FLAGS)
_PRICE = flags.DEFINE_float(
  "price", 0.0, "Price of one chip for one hour, in any currency; 0 for none.", 0, flag_values=FLAGS
)
_GIB = 2**30
_NO_FIT = 1


def main(arguments: Sequence[str]) -> int:
  """Prints a plan for each topology and stage; returns 1 if one of them does not fit."""
  rest, overrides = configuration.split(arguments)
  parse(FLAGS, rest)
  config = configuration.load(_CONFIG.value, overrides=overrides)
  code = 0
  for topology in _TOPOLOGY.value:
    print(f"{topology}: compiling", file=sys.stderr, flush=True)
    for one in plan(config, topologies=[topology], stage=_STAGE.value):
      print("\n".join(describe(one, price=_PRICE.value)), flush=True)
      code = code if one.fits else _NO_FIT
  return code


def describe(one: Plan, *, price: float) -> list[str]:
  """Returns the lines of a plan.

  Args:
    one: The plan.
    price: Price of one chip for one hour; 0 leaves the line of money out.
  """
  mesh = ", ".join(f"{name} {size}" for name, size in one.mesh.items()) or "one device"
  kinds = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in one.memory.items() if name != "peak")
  lines = [
    f"{one.topology}, stage {one.stage}: {one.devices} chips, mesh {mesh}, remat {one.remat}, compiled in "
    f"{one.compile_seconds:.0f} s",
    f"  memory a chip  {one.memory['peak'] / _GIB:.2f} of {one.chip.memory / _GIB:.2f} GiB at the peak; {kinds}",
  ]
  if one.estimate is None:
    return [
      *lines,
      "  does not fit: give fewer rows a chip (training.micro_batches), more fsdp or tensor, or more chips",
    ]
  found = one.estimate
  lines.append(
    f"  matmuls        {found.flops / 1e12:.1f} TFLOP a chip and step, the models' own {one.model_flops / 1e12:.1f}"
  )
  kernels = f", of that {1e3 * found.kernels:.0f} ms of kernels at their peak" if found.kernels else ""
  lines.append(f"  computation    {1e3 * found.compute:.0f} ms by the compiler's cycles{kernels}")
  for name, seconds in (("serial", found.serial), ("hidden", found.hidden)):
    money = f", money {price * one.devices * one.hours(seconds):,.0f}" if price else ""
    lines.append(
      f"  {name:<14} {1e3 * seconds:.0f} ms a step, MFU {100 * one.mfu(seconds):.0f} %, {one.tokens / seconds:,.0f} "
      f"tokens/s, {one.hours(seconds):.1f} h, {one.devices * one.hours(seconds):,.0f} chip-hours{money}"
    )
  for row in found.traffic:
    lines.append(
      f"  {row.kind:<14} {1e3 * row.seconds:7.1f} ms, {row.bytes / 1e9:7.2f} GB along {' × '.join(row.axes)}, "
      f"{row.count} times, largest {row.largest / 1e6:,.1f} MB"
    )
  if found.unknown_loops:
    lines.append(f"  loops of unknown length, counted once: {', '.join(found.unknown_loops)}")
  if found.unknown_kernels:
    lines.append(f"  kernels of unknown work, counted by their bytes: {', '.join(found.unknown_kernels)}")
  return lines
