"""Descriptions of accelerators that are not here, for which a program can be compiled."""

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from distill.errors import InputError
from distill.planning.chips import CHIPS

# libtpu 0.0.42 takes this machine for a TPU host. Without these it asks a cloud's metadata server for minutes, prints
# warnings, and locks out other processes that compile.
_ENVIRONMENT = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_ACCELERATOR_TYPE": "v5p-8",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
}
_NAME = re.compile(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
  """Devices to compile for.

  Attributes:
    name: As the user wrote it.
    chip: Name of the chip, a key of `CHIPS`.
    platform: Platform to lower for.
    devices: The described devices.
  """

  name: str
  chip: str
  platform: str
  devices: list[Any]


def describe(name: str) -> Topology:
  """Returns the devices of a topology such as v5p:4x4x4, or 2*v5p:8x8x8 for two slices.

  Raises:
    InputError: The name is no topology, or the TPU compiler is not installed or does not know the torus.
  """
  found = _NAME.fullmatch(name)
  if not found:
    raise InputError(f"--topology={name}: give a chip and its torus, as v5p:4x4x4, v6e:8x8, or 2*v5p:8x8x8")
  slices, kind, torus = int(found[1] or 1), found[2], found[3]
  if kind not in CHIPS:
    raise InputError(f"--topology={name}: {kind!r} is no chip that can be planned; use one of {', '.join(CHIPS)}")
  if importlib.util.find_spec("libtpu") is None:
    raise InputError(
      f"--topology={name}: the TPU compiler is not installed; install it with `pip install 'distill[plan]'`"
    )
  for variable, value in _ENVIRONMENT.items():
    os.environ.setdefault(variable, value)
  options = {"num_slices": slices} if slices > 1 else {}
  try:
    devices = topologies.get_topology_desc(f"{kind}:{torus}", "tpu", **options).devices
  except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError, RuntimeError) as error:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    raise InputError(f"--topology={name}: the TPU compiler refuses it: {reason}; use a torus that is sold") from error
  return Topology(name=name, chip=kind, platform="tpu", devices=list(devices))
