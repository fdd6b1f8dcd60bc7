"""Gated-delta-rule linear attention, chunk-parallel in training and recurrent in decoding."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from distill.kernels.gated_delta import gated_delta_rule
from distill.nn.conv import ShortConv
from distill.nn.linear import Linear
from distill.nn.mixer import HeadShape
from distill.nn.norm import RMSNorm
from distill.nn.param import Init, log_rate, time_step

_EPS = 1e-6


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

  kind: ClassVar[str] = "gated delta"
  # The delta rule normalises its output, so rounding errors grow where the output is small: 5 % of the logits' norm
  # with bfloat16 operands in the mixer, 2 % with float32 ones.
  exact_dtype: ClassVar[bool] = True
  bound_to_length: ClassVar[bool] = False

  @property
  def head_shape(self) -> HeadShape:
    """Its value heads, and the key heads that serve them."""
    return HeadShape(
      heads=self.num_value_heads,
      key_heads=self.num_key_heads,
      key_width=self.key_head_dim,
      value_width=self.value_head_dim,
    )

  @property
  def qkv_widths(self) -> tuple[int, int, int]:
    """Widths of all queries, all keys and all values."""
    keys = self.num_key_heads * self.key_head_dim
    return keys, keys, self.num_value_heads * self.value_head_dim

  def build(self, init: Init, *, width: int, norm_eps: float, norm_offset: float) -> "GatedDelta":
    """Makes the module; the scale of its gated norm is stored as it is, whatever `norm_offset`."""
    del norm_offset
    return GatedDelta(init, spec=self, width=width, norm_eps=norm_eps)


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

  def qkv(self, x: Float[Array, "B T D"], *, dtype: DTypeLike) -> tuple[Float[Array, "B T I"], ...]:
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
