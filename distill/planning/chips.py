"""Published figures of accelerators: what a plan divides FLOPs and bytes by."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One accelerator.

  Attributes:
    name: Its name in `--topology`.
    flops: Peak of dense matmuls with bfloat16 operands, FLOP/s.
    memory: Bytes of HBM that a program may use.
    bandwidth: Bytes/s between HBM and the cores.
    link: Bytes/s of one link to a neighbour, one way.
    ring: Chips along a dimension of the torus from which on it closes to a ring; it is a line below.
    network: Bytes/s of one chip to other slices or hosts, one way.
    clock: Cycles/s, by which the compiler's estimates are counted.
  """

  name: str
  flops: float
  memory: float
  bandwidth: float
  link: float
  ring: int
  network: float
  clock: float


# Peak, HBM bandwidth and links are from Google Cloud's page of each TPU version and the JAX scaling book, read in
# 2026-11. Memory is what the compiler of libtpu 0.0.42 lets a program use.
CHIPS: Mapping[str, Chip] = {
  chip.name: chip
  for chip in (
    Chip(
      name="v5e",
      flops=197e12,
      memory=15.75 * 2**30,
      bandwidth=0.82e12,
      link=4.5e10,
      ring=16,
      network=3.1e9,
      clock=1.5e9,
    ),
    Chip(
      name="v5p", flops=459e12, memory=95.74 * 2**30, bandwidth=2.77e12, link=9e10, ring=4, network=6.2e9, clock=1.75e9
    ),
    Chip(
      name="v6e",
      flops=918e12,
      memory=31.24 * 2**30,
      bandwidth=1.64e12,
      link=9e10,
      ring=16,
      network=1.25e10,
      clock=1.75e9,
    ),
  )
}
