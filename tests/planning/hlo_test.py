"""Programs read from the text of optimised HLO: counts are compared with what the jax function states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill.parallel.mesh import MeshConfig, make_mesh
from distill.planning.hlo import COLLECTIVES, Instruction, Program, Shape, matmul_flops, replica_groups


def compiled(function, *shapes):
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return Program(jax.jit(function).lower(*arguments).compile().as_text())


def flops(program):
  return sum(run.times * matmul_flops(run.instruction) for run in program.runs)


def test_a_matmul_in_nested_loops_counts_once_for_every_turn():
  def nested(x, y):
    def outer(x, _):
      return jax.lax.scan(lambda x, _: (jnp.tanh(x @ y), None), x, length=3)[0], None

    return jax.lax.scan(outer, x, length=5)[0]

  program = compiled(nested, (8, 16), (16, 16))
  assert flops(program) == 15 * 2 * 8 * 16 * 16
  assert not program.unknown_loops


def test_batched_and_transposed_matmuls_count_two_flops_for_each_product():
  def both(x, y):
    return jnp.einsum("bij,bkj->bik", x, y), jnp.einsum("bij,bik->jk", x, y)

  assert flops(compiled(both, (3, 4, 5), (3, 4, 5))) == 2 * (3 * 4 * 4 * 5 + 3 * 4 * 5 * 5)


def test_a_convolution_counts_only_products_with_values_and_not_with_padding():
  def convolve(x, kernel):
    return jax.lax.conv_general_dilated(
      x, kernel, (2,), [(2, 1)], lhs_dilation=(1,), rhs_dilation=(1,), dimension_numbers=("NWC", "WIO", "NWC")
    )

  (one,) = (
    run.instruction for run in compiled(convolve, (2, 9, 4), (3, 4, 6)).runs if run.instruction.opcode == "convolution"
  )
  # Output t reads positions 2t - 2 ... 2t, of which those from 0 to 8 hold values: 1, 3, 3, 3, 3 of them.
  assert matmul_flops(one) == 2 * 2 * 6 * 4 * (1 + 3 + 3 + 3 + 3)


def test_a_loop_whose_length_depends_on_data_is_named_and_counts_once():
  def search(x, y):
    return jax.lax.while_loop(lambda x: jnp.sum(x) < 1e6, lambda x: x @ y, x)

  program = compiled(search, (4, 4), (4, 4))
  assert flops(program) == 2 * 4 * 4 * 4
  assert len(program.unknown_loops) == 1


@pytest.mark.parametrize(
  ("axes", "expected"),
  [
    ("data", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("fsdp", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    (("data", "tensor"), [[0, 1, 4, 5], [2, 3, 6, 7]]),
  ],
)
def test_a_collective_names_the_devices_of_each_group_in_the_order_of_the_mesh(axes, expected):
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  x = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, PartitionSpec(("data", "fsdp", "tensor"))))
  add = jax.shard_map(
    lambda x: jax.lax.psum(x, axes),
    mesh=mesh,
    in_specs=PartitionSpec(("data", "fsdp", "tensor")),
    out_specs=PartitionSpec(("data", "fsdp", "tensor")),
    check_vma=False,
  )
  program = Program(jax.jit(add).lower(x).compile().as_text())
  (one,) = (run.instruction for run in program.runs if run.instruction.opcode in COLLECTIVES)
  assert sorted(sorted(group) for group in replica_groups(one, devices=8).tolist()) == expected
  assert one.operands == (Shape("f32", (1, 4)),)


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("replica_groups={{0,2},{1,3}}, use_global_device_ids=true", [[0, 2], [1, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
    ("replica_groups={}", [[0, 1, 2, 3]]),
    ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
  ],
)
def test_every_spelling_of_replica_groups_is_read(text, expected):
  one = Instruction(name="x", opcode="all-reduce", results=(), operands=(), attributes=text, literal="")
  np.testing.assert_array_equal(replica_groups(one, devices=4), expected)
