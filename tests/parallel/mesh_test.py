"""Meshes of devices, shardings by logical axes, and the rows that a process holds."""

import jax
import numpy as np
import pytest

from distill.errors import InputError
from distill.parallel.mesh import (
  MeshConfig,
  batch_sharding,
  batch_shards,
  make_mesh,
  process_rows,
  replicated,
  to_global_batch,
)

CUBE = MeshConfig(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize(
  ("config", "shards"),
  [(MeshConfig(), 8), (CUBE, 4), (MeshConfig(data=1, tensor=8), 1), (MeshConfig(slice=2, data=2, expert=2), 8)],
)
def test_rows_of_a_batch_are_divided_over_all_axes_but_tensor(config, shards):
  mesh = make_mesh(config)
  assert batch_shards(mesh) == shards
  batch = to_global_batch({"tokens": np.arange(16).reshape(8, 2)}, mesh=mesh)
  assert batch["tokens"].sharding == batch_sharding(mesh)
  assert batch["tokens"].addressable_shards[0].data.shape == (8 // shards, 2)
  np.testing.assert_array_equal(batch["tokens"], np.arange(16).reshape(8, 2))
  assert replicated(mesh).shard_shape((8, 2)) == (8, 2)


def test_a_mesh_of_shuffled_devices_holds_the_same_batch():
  mesh = make_mesh(CUBE, devices=[jax.devices()[i] for i in (5, 2, 7, 0, 3, 6, 1, 4)])
  rows = np.arange(24).reshape(8, 3)
  np.testing.assert_array_equal(process_rows(mesh, 8), np.arange(8))
  np.testing.assert_array_equal(to_global_batch(rows, mesh=mesh), rows)


def test_a_mesh_size_of_minus_one_takes_the_remaining_devices():
  assert dict(make_mesh(MeshConfig(fsdp=2)).shape) == {"slice": 1, "data": 4, "fsdp": 2, "expert": 1, "tensor": 1}


@pytest.mark.parametrize("config", [MeshConfig(data=3), MeshConfig(fsdp=3), MeshConfig(fsdp=-1)])
def test_a_mesh_shape_whose_product_is_not_the_number_of_devices_is_refused(config):
  with pytest.raises(InputError, match="does not fit 8 devices"):
    make_mesh(config)
