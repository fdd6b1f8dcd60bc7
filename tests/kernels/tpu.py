"""Compilation for TPUs that are not here, by the compiler in the package libtpu."""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.experimental import topologies

from distill.axes.logical import use_mesh
from distill.parallel.mesh import MeshConfig, make_mesh

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
# The smallest machine with each kind of chip.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def compile_for_tpu(function: Callable[..., Any], *shapes: jax.ShapeDtypeStruct, chip: str) -> Any:
  """Returns `function` of arrays of these shapes, compiled for one chip of a kind."""
  # Without it libtpu 0.0.42 asks the metadata server of a cloud for minutes.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  devices = topologies.get_topology_desc(TOPOLOGIES[chip], "tpu").devices[:1]
  mesh = make_mesh(MeshConfig(), devices=devices)

  def traced(*arguments):
    with use_mesh(mesh):
      return function(*arguments)

  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for x in shapes]
  return jax.jit(traced).trace(*placed).lower(lowering_platforms=("tpu",)).compile()
