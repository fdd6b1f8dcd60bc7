"""The routed experts of an MoE layer: tokens are sorted by expert, multiplied by groups, and added up again."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from distill.axes.logical import LOGICAL_TO_MESH, Axes, spec
from distill.kernels.grouped_matmul import grouped_matmul
from distill.kernels.saved_bits import saved_as_bits
from distill.nn.linear import PROJECTION
from distill.nn.mlp import ACTIVATIONS

# Logical axes of a projection's kernel and bias.
KERNEL_AXES: Axes = ("experts", "embed", None)
BIAS_AXES: Axes = ("experts", None)
# Under expert parallelism a device makes room for this many times its share of the (token, expert) pairs. What exceeds
# it is computed in further passes.
_ROOM = 1.25
_ROOM_UNIT = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
  """What is static about the experts of a layer.

  Attributes:
    act: Activation, one of `ACTIVATIONS`.
    clamp: As in `MoeConfig`.
    dtype: Dtype of the operands of projections.
  """

  act: str
  clamp: tuple[float, float] | None
  dtype: Any

  def gate(self, gate: Array, up: Array) -> Array:
    """Returns the hidden neurons."""
    if self.clamp is None:
      return ACTIVATIONS[self.act](gate) * up
    alpha, limit = self.clamp
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(alpha * gate)


def mix_experts(
  x: Float[Array, "M D"],
  params: Mapping[str, Float[Array, "..."]],
  *,
  weights: Float[Array, "M k"],
  chosen: Int[Array, "M k"],
  static: ExpertsSpec,
) -> Float[Array, "M D"]:
  """Computes Σ_j weights[m, j] * down(gate(x[m]) * up(x[m])) with the projections of expert chosen[m, j].

  The (token, expert) pairs are sorted by expert, and each projection is one grouped matmul. No token is dropped.

  On a mesh each device computes its own experts, on the tokens of all devices that differ from it in their experts
  alone: with e parts of the experts they are all-gathered over the expert axis, and the results reduce-scattered. Each
  device receives (e − 1) · M / e · D numbers twice, for M tokens that share the experts. That is no more than an
  all-to-all of the pairs as long as e is at most k, and needs no capacity. Kernels that are divided over fsdp are
  all-gathered first, in the narrower of their own dtype and that of the operands, and their gradients
  reduce-scattered. A device reserves 1.25 times its fair share of the pairs; a batch that sends it more takes another
  pass, which the backward pass computes again.

  Args:
    x: Tokens.
    params: Kernels [E, D, F] gate.kernel and up.kernel, [E, F, D] down.kernel; optional biases [E, F] gate.bias and
      up.bias.
    weights: Weight of each chosen expert.
    chosen: The chosen experts; those of one token differ.
    static: Activation and dtype.

  Returns:
    The mixture, float32.
  """
  return saved_as_bits(_mix(static, x, weights, chosen, dict(params)), PROJECTION)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(static, x, weights, chosen, params):
  return _batched(static)(x, weights, chosen, params)


def _mix_forward(static, x, weights, chosen, params):
  y, pull = jax.vjp(lambda x, weights, params: _on_mesh(static, x, weights, chosen, params), x, weights, params)
  return y, pull


def _mix_backward(static, pull, cotangent):
  del static
  x_grad, weights_grad, params_grad = pull(cotangent)
  return x_grad, weights_grad, None, params_grad


_mix.defvjp(_mix_forward, _mix_backward)


def _batched(static: ExpertsSpec) -> Callable[..., Any]:
  """Returns `_on_mesh` with a rule for vmap: more rows of tokens are more tokens, and share one grouped matmul."""
  function = custom_vmap(functools.partial(_on_mesh, static))

  @function.def_vmap
  def rule(size, batched, x, weights, chosen, params):
    assert not any(jax.tree.leaves(batched[3])), "experts that differ between the rows of a batch"

    def flat(x, is_batched):
      x = x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
      return x.reshape(-1, x.shape[-1])

    y = function(*map(flat, (x, weights, chosen), batched[:3]), params)
    return y.reshape(size, -1, y.shape[-1]), True

  return function


def _names(entry: Any) -> tuple[str, ...]:
  """Returns an entry of a `PartitionSpec` as a tuple of mesh axes."""
  return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _on_mesh(static, x, weights, chosen, params):
  """Computes the mixture on every device of the ambient mesh, or on the only device."""
  mesh = jax.sharding.get_abstract_mesh()
  experts = params["gate.kernel"].shape[0]
  if mesh.empty or mesh.size == 1:
    return _mix_sorted(static, x, weights, _sorted(chosen, 0, experts), params, share=1.0)
  specs = {name: spec(mesh, x.shape, KERNEL_AXES if x.ndim == 3 else BIAS_AXES) for name, x in params.items()}
  owners = tuple(name for name in _names(specs["gate.kernel"][0]) if name in LOGICAL_TO_MESH["experts"])
  rows = _names(spec(mesh, x.shape, ("batch", None))[0])
  # Devices that hold the same experts and tokens divide the tokens.
  same = [name for name in LOGICAL_TO_MESH["experts"] if name not in (*owners, *rows) and mesh.shape[name] > 1]
  for name in same:
    if x.shape[0] % math.prod(mesh.shape[one] for one in (*rows, name)) == 0:
      rows = (*rows, name)
  gathered = tuple(name for name in owners if name in rows)
  summed = tuple(name for name in owners if name not in rows)
  parts = math.prod(mesh.shape[name] for name in owners)

  def local(x, weights, chosen, params):
    params = {name: _gathered(x, specs[name], owners, static.dtype) for name, x in params.items()}
    first = jax.lax.axis_index(owners) * (experts // parts) if owners else 0
    if gathered:
      x = x.astype(static.dtype)
      x, weights, chosen = (jax.lax.all_gather(one, gathered, tiled=True) for one in (x, weights, chosen))
    y = _mix_sorted(static, x, weights, _sorted(chosen, first, experts // parts), params, share=1 / parts)
    if gathered:
      y = jax.lax.psum_scatter(y, gathered, tiled=True)
    return y[None]

  # The sum over the devices that have the same tokens is left to XLA: the transpose of a psum inside would be another.
  tokens = PartitionSpec(rows or None, None)
  partial = jax.shard_map(
    local,
    in_specs=(tokens, tokens, tokens, specs),
    out_specs=PartitionSpec(summed or None, rows or None, None),
    check_vma=False,
  )(x, weights, chosen, params)
  return jnp.sum(partial, axis=0)


def _gathered(kernel, sharding: PartitionSpec, owners: tuple[str, ...], dtype):
  """Returns the whole kernels of a device's own experts: the other axes that they are divided over are gathered."""
  narrow = dtype if jnp.dtype(dtype).itemsize < kernel.dtype.itemsize else kernel.dtype
  places = [(i, tuple(name for name in _names(entry) if name not in owners)) for i, entry in enumerate(sharding)]
  places = [(i, names) for i, names in places if names]

  @jax.custom_vjp
  def gather(kernel):
    kernel = kernel.astype(narrow)
    for i, names in places:
      kernel = jax.lax.all_gather(kernel, names, axis=i, tiled=True)
    return kernel

  def scatter(_, cotangent):
    # The sum over devices is that of a parameter's gradient, in the parameter's dtype.
    cotangent = cotangent.astype(kernel.dtype)
    for i, names in reversed(places):
      cotangent = jax.lax.psum_scatter(cotangent, names, scatter_dimension=i, tiled=True)
    return (cotangent,)

  gather.defvjp(lambda kernel: (gather(kernel), None), scatter)
  return gather(kernel)


class _Plan(NamedTuple):
  """The (token, expert) pairs of a device's experts, sorted by expert.

  Attributes:
    order: Pairs m * k + j in sorted order; those of other devices' experts are last.
    position: Place of each pair in that order.
    ends: Place after the last pair of each expert.
  """

  order: Int[Array, " pairs"]
  position: Int[Array, "M k"]
  ends: Int[Array, " E"]


def _sorted(chosen, first, experts: int) -> _Plan:
  """Sorts the pairs of the experts `first` to first + experts − 1."""
  mine = (chosen >= first) & (chosen < first + experts)
  local = jnp.where(mine, chosen - first, experts).reshape(-1)
  order = jnp.argsort(local, stable=True)
  position = jnp.argsort(order).reshape(chosen.shape)
  counts = jnp.sum(local[:, None] == jnp.arange(experts, dtype=local.dtype)[None], axis=0, dtype=jnp.int32)
  # Saved, since saved projections are in this order: a recomputed choice could differ by a rounding.
  return _Plan(*(checkpoint_name(x, PROJECTION) for x in (order, position, jnp.cumsum(counts))))


def _mix_sorted(static, x, weights, plan: _Plan, params, *, share: float):
  """Computes what a device's own experts add to each token.

  Args:
    static, x, weights, params: As in `mix_experts`, of the tokens that the device computes and of its own experts.
    plan: The sorted pairs.
    share: The device's part of all experts.
  """
  tokens, top_k = weights.shape
  # Experts of one token differ, so that few experts have few pairs.
  most = tokens * min(top_k, len(plan.ends))
  if share == 1.0:
    return _one_pass(static, x, weights, params, plan, None, tokens * top_k)
  room = -(-math.ceil(_ROOM * share * tokens * top_k) // _ROOM_UNIT) * _ROOM_UNIT
  y = _one_pass(static, x, weights, params, plan, jnp.int32(0), min(room, most))
  return y if room >= most else y + _further_passes(static, room, x, weights, params, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _further_passes(static, rows: int, x, weights, params, plan: _Plan):
  """Computes the pairs after the first `rows`, `rows` at a time: usually none."""

  def one(state):
    first, y = state
    return first + rows, y + _one_pass(static, x, weights, params, plan, first, rows)

  state = jnp.int32(rows), jnp.zeros(x.shape, jnp.float32)
  return jax.lax.while_loop(lambda state: state[0] < plan.ends[-1], one, state)[1]


def _further_forward(static, rows, x, weights, params, plan):
  return _further_passes(static, rows, x, weights, params, plan), (x, weights, params, plan)


def _further_backward(static, rows, saved, cotangent):
  *operands, plan = saved

  def one(state):
    first, grads = state
    _, pull = jax.vjp(lambda *operands: _one_pass(static, *operands, plan, first, rows), *operands)
    return first + rows, jax.tree.map(jnp.add, grads, pull(cotangent))

  state = jnp.int32(rows), tuple(jax.tree.map(jnp.zeros_like, operands))
  return *jax.lax.while_loop(lambda state: state[0] < plan.ends[-1], one, state)[1], None


_further_passes.defvjp(_further_forward, _further_backward)


class _Place(NamedTuple):
  """Where the rows of a pass come from and go to.

  Attributes:
    pair: The pair of each row.
    row: The row of each pair.
    inside: Tells which pairs have a row; None if all have.
  """

  pair: Int[Array, " rows"]
  row: Int[Array, "M k"]
  inside: Any


def _one_pass(static, x, weights, params, plan: _Plan, first, rows: int):
  """Computes `rows` sorted pairs from place `first` on; first = None means that these are all, and all are owned."""
  if first is None:
    place, ends, valid = _Place(plan.order, plan.position, None), plan.ends, None
  else:
    pair = jax.lax.dynamic_slice_in_dim(jnp.pad(plan.order, (0, rows)), first, rows)
    ends = jnp.clip(plan.ends - first, 0, rows)
    row = plan.position - first
    inside = (row >= 0) & (row < ends[-1])
    place = _Place(pair, jnp.where(inside, row, 0), inside)
    valid = (jnp.arange(rows, dtype=jnp.int32) < ends[-1])[:, None]
  sizes = jnp.diff(ends, prepend=0)
  taken, weight = _take_tokens(x.astype(static.dtype), place), _take_weights(weights, place)

  def owned(rows):
    return rows if valid is None else jnp.where(valid, rows, 0)

  def project(name):
    y = owned(grouped_matmul(taken, params[f"{name}.kernel"], sizes=sizes))
    if f"{name}.bias" in params:
      y = y + _of_groups(params[f"{name}.bias"], ends, rows)
    return saved_as_bits(y.astype(static.dtype), PROJECTION).astype(jnp.float32)

  hidden = owned(static.gate(project("gate"), project("up")) * weight[:, None])
  return _add_rows(grouped_matmul(hidden.astype(static.dtype), params["down.kernel"], sizes=sizes), place)


def _of_groups(bias, ends, rows: int):
  """Returns the bias of each row's group, as a product: the gradient of a gather would be a scatter of all rows."""
  numbers = jnp.arange(rows, dtype=jnp.int32)
  group = jax.nn.one_hot(jnp.searchsorted(ends, numbers, side="right"), len(ends), dtype=jnp.float32)
  return jnp.matmul(group, bias.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _at(x, index):
  return x.at[index].get(mode="promise_in_bounds")


def _sum_rows(rows, place: _Place):
  """Returns Σ_j rows[place.row[m, j]] for each token m, float32."""
  total = jnp.zeros((), jnp.float32)
  for j in range(place.row.shape[1]):
    one = _at(rows, place.row[:, j]).astype(jnp.float32)
    total = total + (one if place.inside is None else jnp.where(place.inside[:, j, None], one, 0))
  return total


# Taking tokens and adding rows are each other's transpose: neither needs a scatter.


@jax.custom_vjp
def _take_tokens(x, place: _Place):
  """Returns the token of each row."""
  return _at(x, place.pair // place.row.shape[1])


def _take_backward(place, cotangent):
  return _sum_rows(cotangent, place).astype(cotangent.dtype), None


_take_tokens.defvjp(lambda x, place: (_take_tokens(x, place), place), _take_backward)


@jax.custom_vjp
def _add_rows(rows, place: _Place):
  """Returns the sum of each token's rows."""
  return _sum_rows(rows, place)


_add_rows.defvjp(
  lambda rows, place: (_add_rows(rows, place), place), lambda place, cotangent: (_take_tokens(cotangent, place), None)
)


@jax.custom_vjp
def _take_weights(weights, place: _Place):
  """Returns the weight of each row."""
  return _at(weights.reshape(-1), place.pair)


def _weights_backward(place, cotangent):
  found = _at(cotangent, place.row)
  return (found if place.inside is None else jnp.where(place.inside, found, 0)), None


_take_weights.defvjp(lambda weights, place: (_take_weights(weights, place), place), _weights_backward)
