"""Gated-delta-rule linear attention, chunk-parallel in training and recurrent in decoding."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from distill.nn.conv import ShortConv
from distill.nn.linear import Linear
from distill.nn.norm import RMSNorm
from distill.nn.param import Init, log_rate, time_step

# Positions a chunk, and chunks whose inner quantities exist at one time.
_CHUNK, _BLOCK = 64, 8
_EPS = 1e-6


@jax.custom_vjp
def _unit_lower_inverse(a: Float[Array, "*B C C"]) -> Float[Array, "*B C C"]:
  """(I + a)⁻¹ for strictly lower triangular `a` whose size is a power of two.

  Diagonal blocks double in size: [[P, 0], [A, Q]]⁻¹ = [[P⁻¹, 0], [−Q⁻¹ A P⁻¹, Q⁻¹]]. This is block substitution, stable
  where a product of powers of `a` is not (repeated keys), and nothing but matrix products; LAPACK's batched triangular
  solve has been seen to wait for ever inside XLA's CPU thread pool.
  """
  size, lead = a.shape[-1], a.shape[:-2]
  inverse = jnp.ones((*lead, size, 1, 1), a.dtype)
  width = 1
  while width < size:
    count = size // (2 * width)
    below = a.reshape(*lead, count, 2, width, count, 2, width)[..., :, 1, :, :, 0, :]
    below = jnp.moveaxis(jnp.diagonal(below, axis1=-4, axis2=-2), -1, -3)
    first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
    corner = -second @ below @ first
    top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    inverse = jnp.concatenate([top, jnp.concatenate([corner, second], axis=-1)], axis=-2)
    width *= 2
  return inverse[..., 0, :, :]


def _inverse_forward(a):
  inverse = _unit_lower_inverse(a)
  return inverse, inverse


def _inverse_backward(inverse, cotangent):
  transposed = inverse.swapaxes(-1, -2)
  return (-transposed @ cotangent @ transposed,)


_unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)


def gated_delta_rule(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T N H"],
  v: Float[Array, "B T N P"],
  *,
  log_decay: Float[Array, "B T N"],
  beta: Float[Array, "B T N"],
  segments: Int[Array, "B T"],
  chunk: int = _CHUNK,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N H P"]]:
  """out_t = S_tᵀ q_t with S_t = e^g_t S_{t−1} + β_t k_t (v_t − e^g_t S_{t−1}ᵀ k_t)ᵀ and S = 0 before each document.

  Within a chunk the recurrence is one unit-triangular solve (Yang et al. 2024, 2412.06464, section 3.3); the state goes
  from chunk to chunk by a scan. Of a block of chunks only the state before it is kept for the backward pass, which
  makes the rest again: faster than to bring it back from memory. Everything is float32.

  Args:
    q: Queries, scaled as wanted.
    k: Keys of norm at most one.
    v: Values.
    log_decay: g_t, at most 0.
    beta: Write strengths, 0 to 1.
    segments: Number of the document of each position; any positions of one number must be neighbours.
    chunk: Positions a chunk, C, a power of two; the length need not be a multiple.

  Returns:
    out, and S after the last position. Where beta and log_decay are zero, S stays as it was.
  """
  length = q.shape[1]
  chunk = min(chunk, 1 << (length - 1).bit_length())
  count = -(-length // chunk)
  blocks = -(-count // _BLOCK)
  size = -(-count // blocks)
  pad = blocks * size * chunk - length

  def cut(x):
    """[B,T,N,…] -> [blocks,chunks,B,N,C,…]"""
    x = jnp.pad(x.astype(jnp.float32), [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], blocks, size, chunk, *x.shape[2:]), (1, 2, 4), (0, 1, 3))

  docs = jnp.pad(segments, ((0, 0), (0, pad)), mode="edge").reshape(-1, blocks, size, chunk)
  docs = jnp.moveaxis(docs, 0, 2)
  last = docs[..., -1].reshape(blocks * size, -1)
  previous = jnp.concatenate([jnp.full_like(last[:1], -2), last[:-1]]).reshape(docs.shape[:-1])
  state = jnp.zeros((q.shape[0], *q.shape[2:], v.shape[-1]), jnp.float32)
  xs = (*(cut(x) for x in (q, k, v, log_decay, beta)), docs, previous)
  state, out = jax.lax.scan(jax.checkpoint(_block, prevent_cse=False), state, xs)
  out = jnp.moveaxis(out, (0, 1, 3), (1, 2, 4))
  return out.reshape(out.shape[0], -1, *out.shape[4:])[:, :length], state


def _block(state, xs):
  """The state after a number of chunks [chunks,B,N,C,…], and their outputs."""
  q, k, v, g, beta, docs, previous = xs
  last = docs[..., -1]
  from_before = (docs == previous[..., None]).astype(jnp.float32)[:, :, None]
  to_after = (docs == last[..., None]).astype(jnp.float32)[:, :, None]
  same = (docs[..., :, None] == docs[..., None, :])[:, :, None]

  total = jnp.cumsum(g, axis=-1)
  gap = total[..., :, None] - total[..., None, :]
  order = jnp.arange(g.shape[-1])
  not_later = same & (order[:, None] >= order)
  decay_TS = jnp.exp(jnp.where(not_later, gap, -jnp.inf))
  strictly = jnp.where(order[:, None] > order, decay_TS, 0.0)

  keys = k * beta[..., None]
  mixing = jnp.einsum("...td,...sd->...ts", keys, k) * strictly
  entering = (from_before * jnp.exp(total))[..., None]
  right = jnp.concatenate([v * beta[..., None], keys * entering], axis=-1)
  solved = _unit_lower_inverse(mixing) @ right
  written, read = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
  attention = jnp.einsum("...td,...sd->...ts", q, k) * decay_TS
  leaving = k * (to_after * jnp.exp(total[..., -1:] - total))[..., None]
  keep = (previous == last).astype(jnp.float32)[:, :, None] * jnp.exp(total[..., -1])

  def body(state, xs):
    written, read, attention, queries, leaving, keep = xs
    update = written - read @ state
    out = queries @ state + attention @ update
    return state * keep[..., None, None] + leaving.swapaxes(-1, -2) @ update, out

  return jax.lax.scan(body, state, (written, read, attention, q * entering, leaving, keep))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaConfig:
  """Gated-delta-rule linear attention (Yang et al. 2024, 2412.06464), as in Qwen 3 Next and 3.5.

  Attributes:
    num_key_heads: Heads of queries and keys, a divisor of the value heads; each serves neighbouring value heads.
    num_value_heads: Heads of values N.
    key_head_dim: H.
    value_head_dim: P.
    conv_width: Taps of the convolution W.
  """

  num_key_heads: int
  num_value_heads: int
  key_head_dim: int
  value_head_dim: int
  conv_width: int = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaCache:
  """The last W − 1 inputs of the convolutions of q, k and v, and the recurrent state."""

  window: dict[str, Float[Array, "B W _"]]
  state: Float[Array, "B N H P"]


class GatedDelta(nnx.Module):
  """Short convolution, gated delta rule, gated norm (Yang et al. 2024, 2412.06464), as in Qwen 3 Next and 3.5.

  Args:
    init: Maker of the parameters.
    spec: What it computes.
    width: Model width D.
    norm_eps: Of the gated norm.
  """

  def __init__(self, init: Init, *, spec: GatedDeltaConfig, width: int, norm_eps: float):
    self.spec = spec
    keys, values = spec.num_key_heads * spec.key_head_dim, spec.num_value_heads * spec.value_head_dim
    sizes = {"q": keys, "k": keys, "v": values}

    def project(name: str, out: int, axis: str | None) -> Linear:
      return Linear(init.child(name), shape=(width, out), axes=("embed", axis))

    self.q, self.k, self.v = (project(name, size, "heads") for name, size in sizes.items())
    self.z = project("z", values, "heads")
    self.b = project("b", spec.num_value_heads, None)
    self.a = project("a", spec.num_value_heads, None)
    self.conv = nnx.Dict(
      {
        name: ShortConv(
          init.child("conv").child(name), width=spec.conv_width, channels=size, axis="heads", use_bias=False
        )
        for name, size in sizes.items()
      }
    )
    self.dt_bias = init.param("dt_bias", shape=(spec.num_value_heads,), axes=(None,), init=time_step)
    self.a_log = init.param("a_log", shape=(spec.num_value_heads,), axes=(None,), init=log_rate(0.01))
    self.norm = RMSNorm(init.child("norm"), width=spec.value_head_dim, eps=norm_eps)
    self.o = Linear(init.child("o"), shape=(values, width), axes=("heads", "embed"))

  def _inputs(self, x, dtype):
    """What the convolutions take, by name: [*B, channels], float32."""
    x = x.astype(dtype)
    return {name: getattr(self, name)(x, out=jnp.float32) for name in self.conv}

  def _heads(self, mixed):
    """Convolved inputs -> (q, k [*B,N,H], v [*B,N,P]), float32; q and k of norm one, q scaled."""
    spec = self.spec
    heads = {"q": spec.num_key_heads, "k": spec.num_key_heads, "v": spec.num_value_heads}
    q, k, v = (jax.nn.silu(mixed[name]).reshape(*mixed[name].shape[:-1], heads[name], -1) for name in heads)
    q, k = (x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + _EPS) for x in (q, k))
    q, k = (jnp.repeat(x, spec.num_value_heads // spec.num_key_heads, axis=-2) for x in (q, k))
    return q * spec.key_head_dim**-0.5, k, v

  def _gates(self, x):
    """(log decay, beta) [*B,N], float32 from an input that was not rounded: decays multiply over whole documents."""
    x = x.astype(jnp.float32)
    a = self.a(x) + self.dt_bias[...]
    return -jnp.exp(self.a_log[...]) * jax.nn.softplus(a), jax.nn.sigmoid(self.b(x))

  def _output(self, y, x, dtype):
    z = self.z(x.astype(dtype)).reshape(y.shape).astype(jnp.float32)
    y = (self.norm(y) * jax.nn.silu(z)).astype(dtype)
    return self.o(y.reshape(*x.shape[:-1], -1), out=jnp.float32)

  def _mix(self, x, *, segments, real, dtype):
    """(mixed sequence, inputs of the convolutions, last state [B,N,H,P]); the state passes over what is not `real`
    [B,T] unchanged."""
    inputs = self._inputs(x, dtype)
    q, k, v = self._heads({name: self.conv[name](y, segments=segments) for name, y in inputs.items()})
    log_decay, beta = self._gates(x)
    if real is not None:
      log_decay, beta = (jnp.where(real[..., None], gate, 0.0) for gate in (log_decay, beta))
    y, state = gated_delta_rule(q, k, v, log_decay=log_decay, beta=beta, segments=segments)
    return self._output(y, x, dtype), inputs, state

  def related(self, x: Float[Array, "B T D"], *, dtype: DTypeLike) -> tuple[Float[Array, "B T I"], ...]:
    """Queries, keys and values of all heads side by side, float32, as projected: not convolved."""
    return tuple(self._inputs(x, dtype)[name] for name in "qkv")

  def __call__(
    self, x: Float[Array, "B T D"], *, segments: Int[Array, "B T"], positions: Int[Array, "B T"], dtype: DTypeLike
  ) -> Float[Array, "B T D"]:
    """Mixed sequence, float32; operands of projections are `dtype`. Convolution and state start afresh with every
    document."""
    del positions
    return self._mix(x, segments=segments, real=None, dtype=dtype)[0]

  def init_cache(self, batch: int, *, length: int, dtype: DTypeLike) -> DeltaCache:
    """An empty cache, float32; its size does not depend on `length`."""
    del length, dtype
    spec = self.spec
    return DeltaCache(
      window={name: conv.empty(batch) for name, conv in self.conv.items()},
      state=jnp.zeros((batch, spec.num_value_heads, spec.key_head_dim, spec.value_head_dim), jnp.float32),
    )

  def prefill(
    self, x: Float[Array, "B T D"], *, lengths: Int[Array, " B"], length: int, dtype: DTypeLike
  ) -> tuple[Float[Array, "B T D"], DeltaCache]:
    """Rows of `lengths` positions at once, and the cache as `lengths` steps would leave it; outputs past a row's length
    mean nothing."""
    del length
    real = jnp.arange(x.shape[1]) < lengths[:, None]
    y, inputs, state = self._mix(x, segments=jnp.ones(x.shape[:2], jnp.int32), real=real, dtype=dtype)
    window = {name: self.conv[name].window(one, lengths=lengths) for name, one in inputs.items()}
    return y, DeltaCache(window=window, state=state)

  def step(
    self, x: Float[Array, "B D"], *, cache: DeltaCache, positions: Int[Array, " B"], dtype: DTypeLike
  ) -> tuple[Float[Array, "B D"], DeltaCache]:
    """One position a row, float32, by the recurrence itself."""
    del positions
    mixed, window = {}, {}
    for name, inputs in self._inputs(x, dtype).items():
      mixed[name], window[name] = self.conv[name].step(inputs, window=cache.window[name])
    q, k, v = self._heads(mixed)
    log_decay, beta = self._gates(x)
    state = cache.state * jnp.exp(log_decay)[..., None, None]
    error = (v - jnp.einsum("bnhp,bnh->bnp", state, k)) * beta[..., None]
    state = state + jnp.einsum("bnh,bnp->bnhp", k, error)
    y = jnp.einsum("bnhp,bnh->bnp", state, q)
    return self._output(y, x, dtype), DeltaCache(window=window, state=state)
