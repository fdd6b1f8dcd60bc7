import numpy as np
import pytest
from jax.sharding import PartitionSpec

from distill.errors import InputError
from distill.parallel.mesh import batch_sharding, batch_shards, make_mesh, replicated, sharding, to_global_batch


def test_a_dimension_is_sharded_if_the_mesh_axis_divides_it_and_otherwise_replicated():
  mesh = make_mesh((2, 2, 2))
  assert sharding(mesh, (6, 8), ("embed", "mlp")).spec == PartitionSpec("fsdp", "tensor")
  assert sharding(mesh, (7, 8), ("embed", "mlp")).spec == PartitionSpec(None, "tensor")
  assert sharding(mesh, (3, 4, 5), ("layers", None, "batch")).spec == PartitionSpec(None, None, None)
  assert sharding(mesh, (8, 4), ("batch", None)).spec == PartitionSpec(("data", "fsdp"), None)


@pytest.mark.parametrize(("shape", "shards"), [((-1, 1, 1), 8), ((2, 2, 2), 4), ((1, 1, 8), 1)])
def test_batch_rows_are_sharded_over_the_data_and_fsdp_axes(shape, shards):
  mesh = make_mesh(shape)
  assert batch_shards(mesh) == shards
  batch = to_global_batch({"tokens": np.arange(16).reshape(8, 2)}, mesh=mesh)
  assert batch["tokens"].sharding == batch_sharding(mesh)
  assert batch["tokens"].addressable_shards[0].data.shape == (8 // shards, 2)
  assert replicated(mesh).shard_shape((8, 2)) == (8, 2)


def test_a_mesh_size_of_minus_one_takes_the_remaining_devices():
  assert dict(make_mesh((-1, 2, 1)).shape) == {"data": 4, "fsdp": 2, "tensor": 1}


@pytest.mark.parametrize("shape", [(3, 1, 1), (8, 1), (-1, 3, 1)])
def test_a_mesh_shape_whose_product_is_not_the_number_of_devices_is_refused(shape):
  with pytest.raises(InputError, match="does not fit 8 devices"):
    make_mesh(shape)
