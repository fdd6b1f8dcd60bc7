"""Shardings by logical axes, and what they do inside a traced function."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from distill.axes.logical import constrain, each_shard, platform, sum_shards, undivided, use_mesh
from distill.parallel.mesh import MeshConfig, make_mesh, replicated, sharding

CUBE = MeshConfig(data=2, fsdp=2, tensor=2)


def test_dimensions_are_sharded_by_their_logical_axes_where_they_divide():
  mesh = make_mesh(CUBE)
  assert sharding(mesh, (6, 8), ("embed", "mlp")).spec == PartitionSpec("fsdp", "tensor")
  assert sharding(mesh, (8, 4), ("batch", None)).spec == PartitionSpec(("data", "fsdp"), None)
  assert sharding(mesh, (3, 4, 5), ("layers", None, None)).spec == PartitionSpec(None, None, None)


def test_a_mesh_axis_moves_to_the_largest_dimension_that_divides_if_its_own_does_not():
  mesh = make_mesh(MeshConfig(data=1, fsdp=8))
  assert sharding(mesh, (2, 12, 8, 64), ("layers", "embed", "mlp", None)).spec == PartitionSpec(
    None, None, None, "fsdp"
  )
  assert sharding(mesh, (8, 12), ("layers", "embed")).spec == PartitionSpec(None, None)
  assert undivided(mesh, (8, 12), ("layers", "embed")) == ["fsdp"]
  assert undivided(mesh, (12, 64), ("embed", "mlp")) == []


def test_constrain_divides_an_activation_inside_use_mesh_and_changes_nothing_outside():
  mesh = make_mesh(CUBE)

  def double(x):
    with use_mesh(mesh):
      return constrain(x * 2, ("batch", None))

  x = jax.device_put(jnp.ones((4, 3)), replicated(mesh))
  assert jax.jit(double)(x).sharding.shard_shape(x.shape) == (1, 3)
  assert constrain(x, ("batch", None)) is x


def test_each_shard_runs_a_function_on_the_part_that_each_device_holds():
  mesh = make_mesh(CUBE)
  axes = ("batch", "mlp")

  def local_maximum(x):
    with use_mesh(mesh):
      run = each_shard(lambda part: jnp.full_like(part, jnp.max(part)), inputs=[axes], outputs=[axes], like=[x, x])
      return run(x)

  x = jax.device_put(jnp.arange(16.0).reshape(4, 4), replicated(mesh))
  expected = np.repeat(np.asarray([[1.0, 3.0], [5.0, 7.0], [9.0, 11.0], [13.0, 15.0]]), 2, axis=1)
  np.testing.assert_array_equal(jax.jit(local_maximum)(x), expected)


def test_sum_shards_adds_all_parts_and_leaves_each_device_its_part_of_the_sum():
  mesh = make_mesh(MeshConfig(data=2, fsdp=4))

  def total(x):
    with use_mesh(mesh):
      return sum_shards(x, ("embed", "vocab"))

  x = jnp.arange(8.0 * 8 * 3).reshape(8, 8, 3)
  found = jax.jit(total)(jax.device_put(x, replicated(mesh)))
  np.testing.assert_array_equal(found, np.sum(x, axis=0))
  assert found.sharding.shard_shape(found.shape) == (2, 3)


def test_the_platform_is_that_of_the_mesh_in_use():
  with use_mesh(make_mesh(CUBE)):
    assert platform() == "cpu"
  assert platform() == jax.default_backend()
