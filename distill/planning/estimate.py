"""Estimates of a compiled step on an accelerator: compute by the compiler's cycles, communication by links."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from distill.planning.chips import Chip
from distill.planning.hlo import COLLECTIVES, Program, Run, matmul_flops, replica_groups
from distill.planning.pallas import kernel_bytes, kernel_flops

# How often a ring of n members passes the larger of operand and result on, apart from the factor (n - 1) / n.
_RING_PASSES = {"all-reduce": 2.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
  """All collectives of one kind along the same mesh axes.

  Attributes:
    kind: As in HLO; an all-reduce of which each device keeps one part is a reduce-scatter.
    axes: Mesh axes along which the members of a group differ.
    count: Runs in one step.
    bytes: Bytes that one device receives in one step.
    seconds: Time of that, if nothing else uses the links.
    largest: Bytes of the largest array that one of them makes or reads.
  """

  kind: str
  axes: tuple[str, ...]
  count: int
  bytes: float
  seconds: float
  largest: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
  """Time and work of one step on one device.

  Attributes:
    flops: FLOPs of all matmuls, those of Pallas kernels by their own count.
    compute: Seconds of computation: the compiler's cycles, and hand-written kernels by their FLOPs and bytes.
    kernels: The part of `compute` that is hand-written kernels.
    traffic: Communication, the slowest first.
    unknown_loops: Loops whose turns are unknown; they count once, and the estimate is too low.
    unknown_kernels: Hand-written kernels of unknown work; they count their bytes alone.
  """

  flops: float
  compute: float
  kernels: float
  traffic: tuple[Traffic, ...]
  unknown_loops: tuple[str, ...]
  unknown_kernels: tuple[str, ...]

  @property
  def communication(self) -> float:
    """Seconds of all communication."""
    return sum(one.seconds for one in self.traffic)

  @property
  def serial(self) -> float:
    """Seconds of a step if computation waits for all communication."""
    return self.compute + self.communication

  @property
  def hidden(self) -> float:
    """Seconds of a step if computation and communication overlap fully."""
    return max(self.compute, self.communication)


def estimate(text: str, *, chip: Chip, mesh: Any) -> Estimate:
  """Estimates one step from its optimised HLO.

  Args:
    text: From `compiled.as_text()`.
    chip: The accelerator that it was compiled for.
    mesh: The mesh that it was compiled for; its devices have their places in the torus as `coords`.
  """
  program = Program(text)
  flops = float(sum(matmul_flops(run.instruction) * run.times for run in program.runs))
  cycles = sum(_cycles(run) for run in program.runs)
  seconds, unknown = 0.0, set()
  for run in program.runs:
    work = kernel_flops(run.instruction)
    if work == 0.0:
      continue
    if work is None:
      unknown.add(run.instruction.name)
    flops += run.times * (work or 0.0)
    # A kernel runs at the peak of the matmuls or of the memory, whichever takes longer.
    seconds += run.times * max((work or 0.0) / chip.flops, kernel_bytes(run.instruction) / chip.bandwidth)
  return Estimate(
    flops=flops,
    compute=cycles / chip.clock + seconds,
    kernels=seconds,
    traffic=traffic(program, chip=chip, mesh=mesh),
    unknown_loops=tuple(program.unknown_loops),
    unknown_kernels=tuple(sorted(unknown)),
  )


def _cycles(run: Run) -> int:
  cycles = run.instruction.number("estimated_cycles")
  # A fusion states the cycles of what is in it; some custom calls state the largest integer for unknown.
  counted = cycles is not None and not run.fused and run.instruction.opcode != "while" and abs(cycles) < 2**40
  return run.times * cycles if cycles is not None and counted else 0


def traffic(program: Program, *, chip: Chip, mesh: Any) -> tuple[Traffic, ...]:
  """Returns the communication of one step by kind and mesh axes, the slowest first.

  Args:
    program: The compiled step.
    chip: The accelerator, for the speed of its links.
    mesh: The mesh; its devices have their places in the torus as `coords`.
  """
  found: dict[tuple[str, tuple[str, ...]], list[tuple[int, float, float, int]]] = collections.defaultdict(list)
  for run in program.runs:
    kind = run.instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
      continue
    groups = replica_groups(run.instruction, devices=mesh.size)
    if groups.shape[1] < 2:
      continue
    if kind == "all-reduce" and "reduce-scatter" in run.computation:
      kind = "reduce-scatter"
    inputs, results = (sum(x.bytes for x in some) for some in (run.instruction.operands, run.instruction.results))
    # The results of a `-start` hold its operands as well.
    size = max(inputs, results - (inputs if run.instruction.opcode.endswith("-start") else 0))
    received = _RING_PASSES.get(kind, 1.0) * size * (1 - 1 / groups.shape[1])
    seconds = received / _bandwidth(groups[0], chip=chip, mesh=mesh)
    key = kind, _axes(groups[0], mesh)
    found[key].append((run.times, run.times * received, run.times * seconds, size))
  rows = [
    Traffic(
      kind=kind,
      axes=axes,
      count=sum(one[0] for one in some),
      bytes=sum(one[1] for one in some),
      seconds=sum(one[2] for one in some),
      largest=max(one[3] for one in some),
    )
    for (kind, axes), some in found.items()
  ]
  return tuple(sorted(rows, key=lambda one: -one.seconds))


def _axes(group: np.ndarray, mesh: Any) -> tuple[str, ...]:
  """Returns the mesh axes along which a group's members differ; HLO numbers devices in the order of the mesh."""
  places = np.unravel_index(group, mesh.devices.shape)
  return tuple(name for name, at in zip(mesh.axis_names, places, strict=True) if len(set(at.tolist())) > 1)


def _bandwidth(group: np.ndarray, *, chip: Chip, mesh: Any) -> float:
  """Returns the bytes/s that one member can receive: links along the dimensions of the torus that the group spans."""
  members = [mesh.devices.flat[i] for i in group]
  if len({getattr(one, "slice_index", 0) for one in members}) > 1:
    return chip.network
  coordinates: Sequence[Sequence[int]] = [tuple(getattr(one, "coords", (i,))) for i, one in enumerate(members)]
  links = 0
  for places in zip(*coordinates, strict=True):
    extent = len(set(places))
    if extent > 1:
      links += 2 if extent >= chip.ring and extent == max(places) - min(places) + 1 else 1
  return chip.link * max(links, 1)
