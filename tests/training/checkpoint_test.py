import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill.errors import InputError
from distill.parallel.mesh import MeshConfig, make_mesh
from distill.training.checkpoint import Checkpoints, digests, flatten_state, unflatten_state


def arrays(seed):
  rng = np.random.default_rng(seed)
  return {
    "params.layers.0.kernel": jnp.asarray(rng.normal(size=(8, 12)), jnp.float32),
    "params.half": jnp.asarray(rng.normal(size=(4,)), jnp.bfloat16),
    "optimizer.1/count": jnp.asarray(seed, jnp.int32),
  }


def abstract(extra):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays(0))


@pytest.fixture
def saved(tmp_path):
  """Returns a directory with the checkpoints of steps 3 and 7."""
  checkpoints = Checkpoints(tmp_path)
  for step in (3, 7):
    checkpoints.save(step, arrays=arrays(step), extra={"step": step})
  checkpoints.close()
  return tmp_path


def damage(directory):
  """Flips one bit in the middle of every data file of a checkpoint, as Orbax never reads some of them."""
  for path in directory.glob("arrays/**/d/*"):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_arrays_restored_from_a_checkpoint_are_bit_equal_to_the_saved_ones(saved):
  got, extra = Checkpoints(saved).restore(abstract)
  assert extra == {"step": 7}
  for name, value in arrays(7).items():
    assert got[name].dtype == value.dtype
    assert np.asarray(got[name]).tobytes() == np.asarray(value).tobytes()


def test_a_checkpoint_can_be_restored_onto_another_mesh_than_it_was_saved_from(saved):
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  place = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))

  def spread(extra):
    return {
      name: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=place if x.ndim == 2 else NamedSharding(mesh, PartitionSpec())
      )
      for name, x in abstract(extra).items()
    }

  got, _ = Checkpoints(saved).restore(spread)
  assert got["params.layers.0.kernel"].sharding == place
  np.testing.assert_array_equal(got["params.layers.0.kernel"], arrays(7)["params.layers.0.kernel"])


def test_restore_skips_a_checkpoint_with_a_flipped_bit_and_returns_the_previous_one(saved):
  damage(saved / "7")
  lines = []
  _, extra = Checkpoints(saved).restore(abstract, log=lines.append)
  assert extra == {"step": 3}
  assert len(lines) == 1 and "checkpoint 7 is damaged" in lines[0]


def test_a_directory_of_only_damaged_checkpoints_is_refused(saved):
  damage(saved / "3")
  damage(saved / "7")
  with pytest.raises(InputError, match="every checkpoint is damaged"):
    Checkpoints(saved).restore(abstract, log=lambda line: None)


def test_restore_returns_none_without_checkpoints(tmp_path):
  assert Checkpoints(tmp_path).restore(abstract) is None


def test_flipping_any_single_bit_of_an_array_changes_its_digest():
  value = np.random.default_rng(0).normal(size=33).astype(np.float32)
  before = digests({"x": jnp.asarray(value)})
  for index in (0, 7, 32):
    for bit in range(32):
      other = value.view(np.uint32).copy()
      other[index] ^= np.uint32(1 << bit)
      assert digests({"x": jnp.asarray(other.view(np.float32))}) != before


def test_an_optimizer_state_is_flattened_to_string_names_and_rebuilt_with_its_structure():
  params = {"a.b": jnp.ones((2, 3)), "c": jnp.zeros(4)}
  state = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)).init(params)
  flat = flatten_state(state)
  assert all(isinstance(name, str) for name in flat)
  again = unflatten_state(jax.eval_shape(lambda: state), flat)
  assert jax.tree.structure(again) == jax.tree.structure(state)
