"""Time of communication on a torus, from programs compiled for virtual devices that stand at given places."""

import dataclasses

import numpy as np
import pytest

from distill.planning.chips import CHIPS
from distill.planning.estimate import traffic
from distill.planning.hlo import Program

V5P = CHIPS["v5p"]


@dataclasses.dataclass(frozen=True)
class Device:
  """A described chip."""

  coords: tuple[int, ...]
  slice_index: int = 0


@dataclasses.dataclass(frozen=True)
class Devices:
  """The part of a mesh that `traffic` reads."""

  devices: np.ndarray
  axis_names: tuple[str, ...]

  @property
  def size(self):
    return self.devices.size


def line(count, *, slices=1):
  """Returns a mesh of `slices` lines of chips along the first dimension of the torus."""
  devices = np.empty((slices, count), dtype=object)
  for i in range(slices):
    for j in range(count):
      devices[i, j] = Device((j, 0, 0), i)
  return Devices(devices, ("slice", "fsdp"))


def program(opcode, groups, *, times=1, operand="f32[8,4]", result="f32[8,4]"):
  """Returns a program that runs one collective, in a loop if `times` is above 1."""
  one = f"%c = {result} {opcode}(%x), replica_groups={groups}"
  if times == 1:
    return Program(f"ENTRY %main (x: {operand}) -> {result} {{\n  %x = {operand} parameter(0)\n  ROOT {one}\n}}\n")
  return Program(
    f"%body (x: {operand}) -> {result} {{\n  %x = {operand} parameter(0)\n  ROOT {one}\n}}\n"
    f"%condition (x: {operand}) -> pred[] {{\n  %x = {operand} parameter(0)\n  ROOT %p = pred[] custom-call(%x)\n}}\n"
    f"ENTRY %main (x: {operand}) -> {result} {{\n  %x = {operand} parameter(0)\n"
    f"  ROOT %w = {result} while(%x), condition=%condition, body=%body, "
    f'backend_config={{"known_trip_count":{{"n":"{times}"}}}}\n}}\n'
  )


@pytest.mark.parametrize(
  ("opcode", "operand", "result", "received"),
  [
    ("all-gather", "f32[2,4]", "f32[8,4]", 3 / 4),
    ("reduce-scatter", "f32[8,4]", "f32[2,4]", 3 / 4),
    ("all-reduce", "f32[8,4]", "f32[8,4]", 6 / 4),
  ],
)
def test_a_collective_on_a_ring_receives_the_parts_of_the_others_over_both_links(opcode, operand, result, received):
  (row,) = traffic(program(opcode, "[1,4]<=[4]", operand=operand, result=result), chip=V5P, mesh=line(4))
  assert (row.kind, row.axes, row.count, row.largest) == (opcode, ("fsdp",), 1, 128)
  assert row.bytes == 128 * received
  assert row.seconds == pytest.approx(128 * received / (2 * V5P.link))


def test_a_line_too_short_for_a_ring_has_one_link():
  (row,) = traffic(program("all-reduce", "[1,2]<=[2]"), chip=V5P, mesh=line(2))
  assert row.seconds == pytest.approx(128 / V5P.link)


def test_a_collective_in_a_loop_counts_every_turn():
  (row,) = traffic(program("all-reduce", "[1,4]<=[4]", times=7), chip=V5P, mesh=line(4))
  assert (row.count, row.bytes) == (7, 7 * 128 * 6 / 4)


def test_members_in_several_slices_are_joined_by_the_network():
  (row,) = traffic(program("all-reduce", "[4,2]<=[2,4]T(1,0)"), chip=V5P, mesh=line(4, slices=2))
  assert row.axes == ("slice",)
  assert row.seconds == pytest.approx(128 / V5P.network)


def test_an_all_reduce_of_which_each_device_keeps_a_part_is_a_reduce_scatter():
  text = (
    "%all-reduce-scatter.1 (x: f32[8,4]) -> f32[2,4] {\n  %x = f32[8,4] parameter(0)\n"
    "  %c = f32[8,4] all-reduce(%x), replica_groups=[1,4]<=[4]\n  ROOT %s = f32[2,4] dynamic-slice(%c)\n}\n"
    "ENTRY %main (x: f32[8,4]) -> f32[2,4] {\n  %x = f32[8,4] parameter(0)\n"
    "  ROOT %f = f32[2,4] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1\n}\n"
  )
  (row,) = traffic(Program(text), chip=V5P, mesh=line(4))
  assert (row.kind, row.bytes) == ("reduce-scatter", 96)


def test_a_group_of_one_device_costs_nothing():
  assert traffic(program("all-reduce", "[4,1]<=[4]"), chip=V5P, mesh=line(4)) == ()
