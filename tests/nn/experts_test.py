import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.axes.logical import use_mesh
from distill.models.remat import REMAT_POLICIES
from distill.nn import experts as module
from distill.nn.experts import BIAS_AXES, KERNEL_AXES, ExpertsSpec, mix_experts
from distill.parallel.mesh import MeshConfig, make_mesh, sharding

EXPERTS, TOP_K, WIDTH, NEURONS = 8, 3, 8, 16
FLOAT32 = ExpertsSpec(act="silu", clamp=None, dtype=jnp.dtype("float32"))


def problem(tokens=48, *, experts=EXPERTS, skew=0.0, dtype="float32"):
  """Random tokens, parameters, weights, and chosen experts; with `skew`, most tokens choose the first experts."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(tokens, WIDTH))
  wide, narrow = (experts, WIDTH, NEURONS), (experts, NEURONS, WIDTH)
  shapes = {"gate.kernel": wide, "up.kernel": wide, "down.kernel": narrow, "gate.bias": wide[::2], "up.bias": wide[::2]}
  params = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
  logits = rng.normal(size=(tokens, experts)) - skew * np.arange(experts)
  chosen = np.argsort(-logits, axis=-1)[:, :TOP_K]
  weights = rng.uniform(size=chosen.shape)
  return jnp.asarray(x, jnp.float32), params, jnp.asarray(weights, jnp.float32), jnp.asarray(chosen, jnp.int32)


def dense(x, params, weights, chosen, static=FLOAT32):
  """Computes all experts for all tokens."""
  gate, up = (jnp.einsum("md,edf->emf", x, params[f"{name}.kernel"]) for name in ("gate", "up"))
  hidden = static.gate(gate + params["gate.bias"][:, None], up + params["up.bias"][:, None])
  is_chosen = jax.nn.one_hot(chosen, gate.shape[0], dtype=x.dtype)
  return jnp.einsum("emf,efd,mke,mk->md", hidden, params["down.kernel"], is_chosen, weights)


def mixed(x, params, weights, chosen, static=FLOAT32):
  return mix_experts(x, params, weights=weights, chosen=chosen, static=static)


def value_and_gradients(function, x, params, weights, chosen):
  def loss(x, params, weights):
    y = function(x, params, weights, chosen)
    return jnp.sum(jnp.sin(y)), y

  (_, y), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, params, weights)
  return y, grads


def run_on(config, function, x, params, weights, chosen):
  """Runs a function on a mesh, everything divided as the logical axes say; on one device without a `config`."""
  if config is None:
    return jax.jit(function)(x, params, weights, chosen)
  mesh = make_mesh(config)

  def put(x, axes):
    axes = (*[None] * (x.ndim - len(axes)), *axes)
    return jax.device_put(x, sharding(mesh, x.shape, axes))

  params = {name: put(one, KERNEL_AXES if name.endswith("kernel") else BIAS_AXES) for name, one in params.items()}
  x, weights, chosen = (put(one, ("batch", None)) for one in (x, weights, chosen))

  @jax.jit
  def run(*arguments):
    with use_mesh(mesh):
      return function(*arguments)

  return run(x, params, weights, chosen)


gradients_of_mixed = functools.partial(value_and_gradients, lambda *arguments: mixed(*arguments))


def assert_close(got, expected, bound=1e-5):
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=bound * float(np.abs(other).max()))


@pytest.mark.parametrize("clamp", [None, (1.7, 0.5)])
@pytest.mark.parametrize("tokens", [1, 2, 48, 300])
def test_the_mixture_equals_computing_every_expert_in_value_and_gradient(tokens, clamp):
  static = ExpertsSpec(act="silu", clamp=clamp, dtype=jnp.dtype("float32"))
  arguments = problem(tokens)
  got = jax.jit(functools.partial(value_and_gradients, functools.partial(mixed, static=static)))(*arguments)
  with jax.enable_x64(True):
    x, params, weights, chosen = jax.tree.map(np.asarray, arguments)
    x, params, weights = jax.tree.map(lambda one: jnp.asarray(one, jnp.float64), (x, params, weights))
    expected = value_and_gradients(functools.partial(dense, static=static), x, params, weights, jnp.asarray(chosen))
    expected = jax.tree.map(np.asarray, expected)
  assert_close(got, expected, bound=5e-5)


MESHES: dict[str, MeshConfig] = {
  "expert=2": MeshConfig(expert=2),
  "expert=4": MeshConfig(expert=4),
  "expert=8": MeshConfig(expert=8),
  "fsdp=8": MeshConfig(fsdp=8),
  "tensor=2": MeshConfig(tensor=2),
  "tensor=8": MeshConfig(data=1, tensor=8),
  "all": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
}


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_computes_the_same_as_one_device(mesh):
  arguments = problem()
  assert_close(run_on(MESHES[mesh], gradients_of_mixed, *arguments), gradients_of_mixed(*arguments))


@pytest.mark.parametrize(("tokens", "experts"), [(48, 6), (9, 8), (9, 3)])
def test_tokens_and_experts_that_do_not_divide_evenly_give_the_same(tokens, experts):
  arguments = problem(tokens, experts=experts)
  for config in (MeshConfig(data=1, expert=4, tensor=2), MeshConfig(data=1, fsdp=2, tensor=4)):
    assert_close(run_on(config, gradients_of_mixed, *arguments), gradients_of_mixed(*arguments))


@pytest.mark.parametrize("config", [MeshConfig(expert=4), MeshConfig(data=1, expert=4, tensor=2)])
def test_experts_that_all_tokens_choose_take_more_passes_and_drop_no_token(monkeypatch, config):
  monkeypatch.setattr(module, "_ROOM_UNIT", 1)
  arguments = problem(skew=10.0)
  assert_close(run_on(config, gradients_of_mixed, *arguments), gradients_of_mixed(*arguments))


def layers(x, params, weights, chosen, remat=None):
  """A scan over layers with the same routing, under a remat policy."""

  def body(x, params):
    return x + mixed(jnp.sin(x), params, weights, chosen), None

  body = body if remat is None else jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
  return jax.lax.scan(body, x, params)[0]


@pytest.mark.parametrize("remat", REMAT_POLICIES)
@pytest.mark.parametrize("config", [None, MESHES["expert=4"], MESHES["all"]])
def test_remat_within_a_scan_changes_nothing(config, remat):
  x, params, weights, chosen = problem()
  stacked = jax.tree.map(lambda one: 0.3 * jnp.stack([one, one[::-1]]), params)
  expected = value_and_gradients(layers, x, stacked, weights, chosen)
  function = functools.partial(value_and_gradients, functools.partial(layers, remat=remat))
  assert_close(run_on(config, function, x, stacked, weights, chosen), expected)


def test_remat_saves_gate_and_up_once_and_the_order_of_their_rows():
  x, params, weights, chosen = problem()
  shapes = {}
  for name, policy in REMAT_POLICIES.items():
    function = jax.checkpoint(lambda x, params, weights: mixed(x, params, weights, chosen), policy=policy)
    leaves = jax.tree.leaves(jax.vjp(function, x, params, weights)[1])
    shapes[name] = [one.shape for one in leaves if one.shape not in {x.shape, *(y.shape for y in params.values())}]
  pairs = len(x) * TOP_K
  assert sorted(shapes["layers"]) == [weights.shape] * 2
  assert sorted(shapes["projections"]) == [(EXPERTS,)] + [chosen.shape] * 2 + [(pairs,)] + [(pairs, NEURONS)] * 2


@pytest.mark.parametrize("config", [None, MESHES["expert=2"]])
def test_rows_of_a_vmapped_batch_share_one_grouped_matmul(monkeypatch, config):
  calls = []
  original = module.grouped_matmul
  monkeypatch.setattr(
    module, "grouped_matmul", lambda x, kernel, *, sizes: calls.append(len(x)) or original(x, kernel, sizes=sizes)
  )
  x, params, weights, chosen = problem()

  def rows(x, params, weights, chosen):
    x, weights, chosen = (one.reshape(8, 6, -1) for one in (x, weights, chosen))
    y = jax.vmap(lambda x, weights, chosen: mixed(x, params, weights, chosen))(x, weights, chosen)
    return y.reshape(48, -1)

  assert_close(run_on(config, rows, x, params, weights, chosen), mixed(x, params, weights, chosen))
  assert len(calls) % 3 == 0


def test_kernels_are_gathered_in_their_own_dtype():
  text = []

  def traced(*arguments):
    text.append(str(jax.make_jaxpr(mixed)(*arguments)))
    return mixed(*arguments)

  run_on(MESHES["fsdp=8"], traced, *problem(dtype="bfloat16"))
  gathered = re.findall(r":(\w+)\[[\d,]*\] = all_gather", text[0])
  assert gathered == ["bf16"] * 3
