import pytest
from jax.sharding import PartitionSpec

from distill.errors import InputError
from distill.parallel.mesh import make_mesh, sharding


def test_axes_shard_where_they_divide_and_replicate_elsewhere():
  mesh = make_mesh((2, 2, 2))
  assert sharding(mesh, (6, 8), ("embed", "mlp")).spec == PartitionSpec("fsdp", "tensor")
  assert sharding(mesh, (7, 8), ("embed", "mlp")).spec == PartitionSpec(None, "tensor")
  assert sharding(mesh, (3, 4, 5), ("layers", None, "batch")).spec == PartitionSpec(None, None, None)


def test_one_entry_takes_the_devices_left():
  assert dict(make_mesh((-1, 2, 1)).shape) == {"data": 4, "fsdp": 2, "tensor": 1}


def test_a_shape_that_does_not_cover_the_devices_is_refused():
  with pytest.raises(InputError, match="does not cover 8 devices"):
    make_mesh((3, 1, 1))
