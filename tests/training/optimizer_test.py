"""Optimizers lower a loss, their state is sharded like the parameters, and it can be restored from a checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill.errors import InputError
from distill.parallel.mesh import MeshConfig, make_mesh
from distill.schedules import CosineScheduleConfig
from distill.training.checkpoint import Checkpoints, flatten_state, unflatten_state
from distill.training.config import OptimizerConfig
from distill.training.optimizer import make_optimizer, multipliers, state_shardings

OPTIMIZERS = {"adamw": 3e-2, "muon": 3e-2, "adafactor": 3e-1, "sgd": 3e-2, "lion": 1e-2}
KERNEL, NORM = "student.groups.0.0.mixer.q.kernel", "student.norm.scale"
NAMES = {KERNEL: ["student.layers.0.mixer.q.kernel", "student.layers.1.mixer.q.kernel"], NORM: [NORM]}
ALL = dict.fromkeys(NAMES, 1.0)


def make(**options):
  return make_optimizer(OptimizerConfig(**options), factors=ALL, names=NAMES, key="optimizer", steps=20)


def initial(mesh=None):
  """Returns parameters, sharded over `mesh` if given: a kernel of two layers [2, 16, 8] and a norm's scale [8]."""
  params = {
    KERNEL: jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 8)), jnp.float32),
    NORM: jnp.ones(8, jnp.float32),
  }
  if mesh is None:
    return params
  axes = {KERNEL: PartitionSpec(None, "fsdp", "tensor"), NORM: PartitionSpec()}
  return {name: jax.device_put(x, NamedSharding(mesh, axes[name])) for name, x in params.items()}


def loss(params):
  return jnp.mean(jnp.square(params[KERNEL] * params[NORM][None, None, :]))


def trained(optimizer, params, state, *, steps):
  """Trains for `steps` steps; returns (parameters, optimizer state, loss of each step)."""

  @jax.jit
  def step(params, state):
    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, value

  losses = []
  for _ in range(steps):
    params, state, value = step(params, state)
    losses.append(float(value))
  return params, state, losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ten_optimizer_steps_lower_the_loss_on_a_mesh_and_the_state_survives_a_checkpoint(name, tmp_path):
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  optimizer, params = make(name=name, learning_rate=OPTIMIZERS[name]), initial(mesh)
  shapes = jax.eval_shape(optimizer.init, params)
  shardings = state_shardings(shapes, params=params, mesh=mesh)
  state = jax.jit(optimizer.init, out_shardings=shardings)(params)
  moments = [x for x in jax.tree.leaves(state) if x.shape == params[KERNEL].shape]
  assert moments and all(x.sharding == params[KERNEL].sharding for x in moments)
  params, state, losses = trained(optimizer, params, state, steps=10)
  assert losses[-1] < 0.9 * losses[0]

  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(10, arrays=flatten_state(state), extra={})
  checkpoints.close()
  places = flatten_state(shardings)
  expected = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[n]) for n, x in flatten_state(shapes).items()}
  arrays, _ = Checkpoints(tmp_path).restore(lambda extra: expected)
  restored = unflatten_state(shapes, arrays)
  jax.tree.map(np.testing.assert_array_equal, restored, state)
  again, _, _ = trained(optimizer, params, restored, steps=1)
  straight, _, _ = trained(optimizer, params, state, steps=1)
  jax.tree.map(np.testing.assert_array_equal, again, straight)


def test_adamw_gives_the_same_updates_as_optax_adamw():
  schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 3, 20)
  theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1))
  rate = CosineScheduleConfig(peak=1e-2, warmup=3)
  mine = make(weight_decay=0.1, learning_rate=rate)
  found = trained(mine, initial(), mine.init(initial()), steps=5)[0]
  # optax 0.2.8 mixes int32 counters with floats in its schedules, which raises under strict promotion.
  with jax.numpy_dtype_promotion("standard"):
    expected = trained(theirs, initial(), theirs.init(initial()), steps=5)[0]
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-6)


def test_muon_makes_the_update_of_every_layer_orthogonal():
  optimizer, params = make(name="muon", learning_rate=1.0, clip_norm=0.0), initial()
  gradient = {KERNEL: params[KERNEL], NORM: params[NORM]}
  updates, _ = optimizer.update(gradient, optimizer.init(params), params)
  for layer in updates[KERNEL]:
    values = np.linalg.svd(layer, compute_uv=False)
    # Five Newton-Schulz iterations leave singular values between 0.7 and 1.2; the RMS of 0.2 scales by 0.2 * sqrt(16).
    assert values.min() / 0.8 > 0.5 and values.max() / 0.8 < 1.3


def test_a_regex_rule_can_scale_the_update_of_single_layers_of_a_stacked_parameter():
  factors = multipliers(((r".*layers\.1\..*", 0.0), (r".*", 2.0)), names=NAMES, what="train")
  np.testing.assert_array_equal(factors[KERNEL], [2.0, 0.0])
  assert factors[NORM] == 2.0
  with pytest.raises(InputError, match=r"train: no rule covers the parameter 'student\.norm\.scale'"):
    multipliers(((r".*layers.*", 1.0),), names=NAMES, what="train")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_frozen_layer_of_a_stacked_parameter_stays_bit_equal(name):
  params = initial()
  trained_layers = {KERNEL: np.asarray([1.0, 0.0], np.float32), NORM: 1.0}
  optimizer = make_optimizer(
    OptimizerConfig(name=name, weight_decay=0.1), factors=trained_layers, names=NAMES, key="optimizer", steps=10
  )
  updates, _ = optimizer.update(jax.grad(loss)(params), optimizer.init(params), params)
  assert np.any(updates[KERNEL][0]) and not np.any(updates[KERNEL][1])
