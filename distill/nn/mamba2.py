"""Mamba-2: a selective state space, chunk-parallel in training and recurrent in decoding."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from distill.kernels.ssd import ssd
from distill.nn.conv import ShortConv
from distill.nn.linear import Linear
from distill.nn.mixer import HeadShape
from distill.nn.norm import RMSNorm
from distill.nn.param import Init, Initializer, log_rate, ones, time_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config:
  """A selective state space whose decays are scalars (Dao & Gu 2024, 2405.21060), as in Mamba-2, Bamba and Granite 4.

  Attributes:
    num_heads: N.
    head_dim: Width of a head P.
    state_size: H; a head's state is [H, P].
    num_groups: A divisor of the heads; neighbouring heads of one group write and read by the same b and c, and are
      normed together.
    conv_width: Taps of the convolution W.
    conv_bias: Of the convolution.
    use_bias: On the projections.
    min_step: Least time step.
    max_step: Largest time step, if there is one.
  """

  num_heads: int
  head_dim: int
  state_size: int
  num_groups: int = 1
  conv_width: int = 4
  conv_bias: bool = True
  use_bias: bool = False
  min_step: float = 0.0
  max_step: float | None = None

  kind: ClassVar[str] = "Mamba-2"
  exact_dtype: ClassVar[bool] = False
  bound_to_length: ClassVar[bool] = False

  @property
  def head_shape(self) -> HeadShape:
    """Its heads, and the groups that share b and c, which stand for keys and queries."""
    return HeadShape(
      heads=self.num_heads, key_heads=self.num_groups, key_width=self.state_size, value_width=self.head_dim
    )

  @property
  def qkv_widths(self) -> tuple[int, int, int]:
    """Widths of c, b and x."""
    shared = self.num_groups * self.state_size
    return shared, shared, self.num_heads * self.head_dim

  def build(self, init: Init, *, width: int, norm_eps: float, norm_offset: float) -> "Mamba2":
    """Makes the module; the scale of its gated norm is stored as it is, whatever `norm_offset`."""
    del norm_offset
    return Mamba2(init, spec=self, width=width, norm_eps=norm_eps)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Cache:
  """The last W − 1 inputs of each convolution, and the recurrent state."""

  windows: dict[str, Float[Array, "B W _"]]
  state: Float[Array, "B N H P"]


class Mamba2(nnx.Module):
  """Short convolutions, selective state space, gated norm (Dao & Gu 2024, 2405.21060).

  Args:
    init: Maker of the parameters.
    spec: What it computes.
    width: Model width D.
    norm_eps: Of the gated norm.
  """

  def __init__(self, init: Init, *, spec: Mamba2Config, width: int, norm_eps: float):
    self.spec = spec
    inner, shared = spec.num_heads * spec.head_dim, spec.num_groups * spec.state_size

    def project(name: str, out: int, axis: str | None) -> Linear:
      return Linear(init.child(name), shape=(width, out), axes=("embed", axis), use_bias=spec.use_bias)

    # What belongs to heads is spread over devices by heads; b and c, which heads share, are whole on each.
    self.z, self.x = project("z", inner, "heads"), project("x", inner, "heads")
    self.b, self.c = project("b", shared, None), project("c", shared, None)
    self.dt = project("dt", spec.num_heads, "heads")
    self.conv = nnx.Dict(
      {
        name: ShortConv(
          init.child(f"conv.{name}"), width=spec.conv_width, channels=channels, axis=axis, use_bias=spec.conv_bias
        )
        for name, channels, axis in (("x", inner, "heads"), ("b", shared, None), ("c", shared, None))
      }
    )

    def per_head(name: str, draw: Initializer) -> nnx.Param:
      return init.param(name, shape=(spec.num_heads,), axes=("heads",), init=draw)

    self.dt_bias, self.a_log = per_head("dt_bias", time_step), per_head("a_log", log_rate(1.0))
    self.skip = per_head("skip", ones)
    self.norm = RMSNorm(init.child("norm"), width=inner, eps=norm_eps, groups=spec.num_groups)
    self.o = Linear(init.child("o"), shape=(inner, width), axes=("heads", "embed"), use_bias=spec.use_bias)

  def _project(self, x, dtype):
    """Projections, float32. Time steps take an input that was not rounded: decays multiply over documents."""
    rounded = x.astype(dtype)
    found = {name: getattr(self, name)(rounded, out=jnp.float32) for name in "zxbc"}
    return {**found, "dt": self.dt(x.astype(jnp.float32))}

  def _split(self, mixed):
    """Convolved [*B, …] -> (x [*B,N,P], b [*B,G,H], c [*B,G,H])."""
    lead, groups = mixed["x"].shape[:-1], self.spec.num_groups
    x, b, c = (jax.nn.silu(mixed[name]) for name in "xbc")
    return x.reshape(*lead, self.spec.num_heads, -1), b.reshape(*lead, groups, -1), c.reshape(*lead, groups, -1)

  def _steps(self, dt):
    """(time steps, log decay) [*B,N]."""
    steps = jnp.clip(jax.nn.softplus(dt + self.dt_bias[...]), self.spec.min_step, self.spec.max_step)
    return steps, -jnp.exp(self.a_log[...]) * steps

  def _gate(self, y, inputs, z):
    """What the output projection reads."""
    y = (y + self.skip[...][:, None] * inputs).reshape(z.shape)
    return self.norm(y * jax.nn.silu(z))

  def _whole(self, projected, segments, real):
    """(what the output projection reads, last state) of whole rows, where only `real` positions change the state."""
    inputs, b, c = self._split({name: self.conv[name](projected[name], segments=segments) for name in "xbc"})
    steps, log_decay = self._steps(projected["dt"])
    if real is not None:
      steps, log_decay = (jnp.where(real[..., None], y, 0.0) for y in (steps, log_decay))
    y, state = ssd(inputs * steps[..., None], log_decay=log_decay, b=b, c=c, segments=segments)
    return self._gate(y, inputs, projected["z"]), state

  def qkv(self, x: Float[Array, "B T D"], *, dtype: DTypeLike) -> tuple[Float[Array, "B T I"], ...]:
    """What stands for queries, keys and values: c, b and x as projected, float32, not convolved."""
    x = x.astype(dtype)
    return tuple(project(x, out=jnp.float32) for project in (self.c, self.b, self.x))

  def __call__(
    self, x: Float[Array, "B T D"], *, segments: Int[Array, "B T"], positions: Int[Array, "B T"], dtype: DTypeLike
  ) -> Float[Array, "B T D"]:
    """Mixed sequence, float32; operands of projections are `dtype`. Convolutions and state start afresh with every
    document."""
    del positions
    # Of what lies between projections only they are kept for the way back.
    y, _ = jax.checkpoint(self._whole)(self._project(x, dtype), segments, None)
    return self.o(y.astype(dtype), out=jnp.float32)

  def init_cache(self, batch: int, *, length: int, dtype: DTypeLike) -> Mamba2Cache:
    """An empty cache, float32; its size does not depend on `length`."""
    del length, dtype
    spec = self.spec
    return Mamba2Cache(
      windows={name: conv.empty(batch) for name, conv in self.conv.items()},
      state=jnp.zeros((batch, spec.num_heads, spec.state_size, spec.head_dim), jnp.float32),
    )

  def prefill(
    self, x: Float[Array, "B T D"], *, lengths: Int[Array, " B"], length: int, dtype: DTypeLike
  ) -> tuple[Float[Array, "B T D"], Mamba2Cache]:
    """The first `lengths` positions of each row at once, float32, and the cache after them; the rest is padding.

    The cache's size does not depend on `length`.
    """
    del length
    projected, real = self._project(x, dtype), jnp.arange(x.shape[1]) < lengths[:, None]
    y, state = self._whole(projected, jnp.ones(x.shape[:2], jnp.int32), real)
    windows = {name: self.conv[name].window(projected[name], lengths=lengths) for name in "xbc"}
    return self.o(y.astype(dtype), out=jnp.float32), Mamba2Cache(windows=windows, state=state)

  def step(
    self, x: Float[Array, "B D"], *, cache: Mamba2Cache, positions: Int[Array, " B"], dtype: DTypeLike
  ) -> tuple[Float[Array, "B D"], Mamba2Cache]:
    """One position a row, float32, by the recurrence itself."""
    del positions
    projected, mixed, windows = self._project(x, dtype), {}, {}
    for name in "xbc":
      mixed[name], windows[name] = self.conv[name].step(projected[name], window=cache.windows[name])
    inputs, b, c = self._split(mixed)
    steps, log_decay = self._steps(projected["dt"])
    b, c = (jnp.repeat(y, self.spec.num_heads // self.spec.num_groups, axis=1) for y in (b, c))
    written = jnp.einsum("bnh,bnp->bnhp", b, inputs * steps[..., None])
    state = cache.state * jnp.exp(log_decay)[..., None, None] + written
    y = self._gate(jnp.einsum("bnhp,bnh->bnp", state, c), inputs, projected["z"])
    return self.o(y.astype(dtype), out=jnp.float32), Mamba2Cache(windows=windows, state=state)
