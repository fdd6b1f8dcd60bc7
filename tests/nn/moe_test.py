import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distill.nn.moe import Moe, MoeConfig
from distill.nn.param import Init
from distill.parallel.mesh import MeshConfig, make_mesh, sharding

CONFIG = MoeConfig(width=7, num_experts=4, top_k=2, use_bias=True, renormalise=False)


def module(config):
  """Returns a mixture of experts whose parameters are all random, biases too."""
  made = Moe(Init(jax.random.key(0)), config=config, width=6)
  graph, state = nnx.split(made)
  leaves, tree = jax.tree.flatten(state)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  drawn = [jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
  return nnx.merge(graph, jax.tree.unflatten(tree, drawn))


def one_by_one(moe, x_TD):
  """Computes the output of the mixture of experts by a loop over tokens and their experts, in float64."""
  get = {name: (np.asarray(e.kernel[...], np.float64), np.asarray(e.bias[...])) for name, e in moe.experts.items()}
  logits = x_TD @ np.asarray(moe.router["kernel"][...], np.float64) + np.asarray(moe.router["bias"][...])
  probs = np.exp(logits - logits.max(-1, keepdims=True))
  probs /= probs.sum(-1, keepdims=True)
  out = np.zeros_like(x_TD)
  for t, x in enumerate(x_TD):
    chosen = np.argsort(-logits[t])[: moe.config.top_k]
    share = probs[t][chosen].sum() if moe.config.renormalise else 1.0
    for e in chosen:
      gate, up = (x @ get[name][0][e] + get[name][1][e] for name in ("gate", "up"))
      if moe.config.clamp is None:
        hidden = gate / (1 + np.exp(-gate)) * up
      else:
        alpha, limit = moe.config.clamp
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        hidden = (up + 1) * gate / (1 + np.exp(-alpha * gate))
      out[t] += probs[t][e] / share * (hidden @ get["down"][0][e] + get["down"][1][e])
  return out


@pytest.mark.parametrize("change", [{}, {"renormalise": True}, {"clamp": (1.7, 0.5)}, {"top_k": 1}])
def test_a_mixture_of_experts_equals_a_loop_over_the_chosen_experts(change):
  moe = module(MoeConfig(**{**vars(CONFIG), **change}))
  x = np.random.default_rng(0).normal(size=(11, 6))
  got = moe(jnp.asarray(x, jnp.float32), dtype=jnp.float32)
  expected = one_by_one(moe, x)
  np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def test_moe_balance_averages_over_valid_tokens_and_its_gradient_spreads_them_over_experts():
  moe = module(MoeConfig(**{**vars(CONFIG), "top_k": 3, "num_experts": 5}))
  x = np.random.default_rng(0).normal(size=(3, 8, 6))
  valid = np.arange(8) < np.asarray([[8], [5], [0]])

  logits = x @ np.asarray(moe.router["kernel"][...], np.float64) + np.asarray(moe.router["bias"][...])
  expected = []
  for row, count in zip(logits, valid.sum(1), strict=True):
    f, p = np.zeros(5), np.zeros(5)
    for token in row[:count]:
      f[np.argsort(-token)[:3]] += 5 / 3 / count
      p += np.exp(token) / np.exp(token).sum() / count
    expected.append((f * p).sum())
  np.testing.assert_allclose(moe.balance(jnp.asarray(x, jnp.float32), valid=jnp.asarray(valid)), expected, rtol=1e-5)

  graph, state = nnx.split(moe)

  @jax.jit
  def descend(state):
    def total(state):
      return jnp.sum(nnx.merge(graph, state).balance(jnp.asarray(x, jnp.float32), valid=jnp.asarray(valid)))

    value, gradient = jax.value_and_grad(total)(state)
    return value, jax.tree.map(lambda x, y: x - 0.1 * y, state, gradient)

  values = []
  for _ in range(200):
    value, state = descend(state)
    values.append(float(value))
  assert values[0] > 2.2 and abs(values[-1] - 2.0) < 0.1  # Two rows that have tokens.


def test_experts_sharded_over_devices_have_the_outputs_and_gradients_of_unsharded_ones():
  graph, state = nnx.split(module(CONFIG))
  x = jax.random.normal(jax.random.key(2), (2, 8, 6))
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  spread = jax.tree.map(
    lambda variable: variable.replace(
      jax.device_put(variable[...], sharding(mesh, variable.shape, variable.get_metadata()["axes"]))
    ),
    state,
    is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
  )
  kernel = spread["experts"]["up"]["kernel"][...]
  assert kernel.sharding.shard_shape(kernel.shape)[0] == CONFIG.num_experts // 2

  @jax.jit
  def run(state, x):
    def loss(state):
      y = nnx.merge(graph, state)(x, dtype=jnp.float32)
      return jnp.sum(jnp.sin(y)), y

    (_, y), grads = jax.value_and_grad(loss, has_aux=True)(state)
    return y, grads

  for a, b in zip(jax.tree.leaves(run(state, x)), jax.tree.leaves(run(spread, x)), strict=True):
    np.testing.assert_allclose(b, a, atol=1e-5 * float(jnp.abs(a).max()))
