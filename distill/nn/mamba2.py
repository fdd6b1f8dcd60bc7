"""Mamba-2: a selective state space model, computed in parallel chunks in training and step by step in decoding."""

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
  """Configuration of a Mamba-2 mixer (Dao & Gu 2024, 2405.21060), as in Mamba-2, Bamba and Granite 4.

  Mamba-2 is a selective state space model: each head has a state matrix that decays by one scalar per position.

  Attributes:
    num_heads: Number of heads N.
    head_dim: Width P of a head's values.
    state_size: Width H of b, the vector that writes to the state, and c, which reads it. A head's state is [H, P].
    num_groups: Number of groups of neighbouring heads, a divisor of `num_heads`. The heads of a group share b and c and
      are normalised together.
    conv_width: Number of taps W of the short convolutions.
    conv_bias: Adds biases to the convolutions.
    use_bias: Adds biases to the projections.
    min_step: Smallest time step; a larger one decays the state more.
    max_step: Largest time step; None for no limit.
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
    """Numbers and widths of the value heads (the Mamba-2 heads) and of the key heads (the groups).

    The heads of a group share b, which writes to the state, and c, which reads it. A group therefore counts as one key
    head, with b as its key.
    """
    return HeadShape(
      heads=self.num_heads, key_heads=self.num_groups, key_width=self.state_size, value_width=self.head_dim
    )

  @property
  def qkv_widths(self) -> tuple[int, int, int]:
    """Widths of c and b, over all groups, and of x, over all heads: the mixer's queries, keys and values."""
    shared = self.num_groups * self.state_size
    return shared, shared, self.num_heads * self.head_dim

  def mixing_flops(self, length: int) -> float:
    """Returns the FLOPs of the recurrence at one position: the state is written and read."""
    del length
    return 4 * self.num_heads * self.head_dim * self.state_size

  def build(self, init: Init, *, width: int, norm_eps: float, norm_offset: float) -> "Mamba2":
    """Makes the module; `norm_offset` is ignored, as the gated norm stores its scale without an offset."""
    del norm_offset
    return Mamba2(init, config=self, width=width, norm_eps=norm_eps)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2State:
  """Decoding state of a Mamba-2 mixer, float32.

  Attributes:
    windows: Name of a convolution -> its last `conv_width` − 1 inputs.
    recurrent: State of each head's recurrence.
  """

  windows: dict[str, Float[Array, "B window _"]]
  recurrent: Float[Array, "B N H P"]


class Mamba2(nnx.Module):
  """A Mamba-2 mixer: short convolutions, a selective state space model and a gated norm (Dao & Gu 2024, 2405.21060).

  Args:
    init: Creates the parameters of the module.
    config: Architecture.
    width: Model width D.
    norm_eps: Epsilon of the gated norm.
  """

  def __init__(self, init: Init, *, config: Mamba2Config, width: int, norm_eps: float):
    self.config = config
    inner, shared = config.num_heads * config.head_dim, config.num_groups * config.state_size

    def project(name: str, out: int, axis: str | None) -> Linear:
      return Linear(init.child(name), shape=(width, out), axes=("embed", axis), use_bias=config.use_bias)

    # Projections of single heads are sharded by heads; b and c, which heads share, are replicated.
    self.z, self.x = project("z", inner, "heads"), project("x", inner, "heads")
    self.b, self.c = project("b", shared, None), project("c", shared, None)
    self.dt = project("dt", config.num_heads, "heads")
    self.conv = nnx.Dict(
      {
        name: ShortConv(
          init.child(f"conv.{name}"), width=config.conv_width, channels=channels, axis=axis, use_bias=config.conv_bias
        )
        for name, channels, axis in (("x", inner, "heads"), ("b", shared, None), ("c", shared, None))
      }
    )

    def per_head(name: str, draw: Initializer) -> nnx.Param:
      return init.param(name, shape=(config.num_heads,), axes=("heads",), init=draw)

    self.dt_bias, self.a_log = per_head("dt_bias", time_step), per_head("a_log", log_rate(1.0))
    self.skip = per_head("skip", ones)
    self.norm = RMSNorm(init.child("norm"), width=inner, eps=norm_eps, groups=config.num_groups)
    self.o = Linear(init.child("o"), shape=(inner, width), axes=("heads", "embed"), use_bias=config.use_bias)

  def _project(self, x, dtype):
    """Returns the input projections of x, float32, in a dictionary with the keys z, x, b, c and dt."""
    rounded = x.astype(dtype)
    projected = {name: getattr(self, name)(rounded, out=jnp.float32) for name in "zxbc"}
    # The input of time steps is not rounded: decays multiply over whole documents.
    return {**projected, "dt": self.dt(x.astype(jnp.float32))}

  def _split(self, convolved):
    """Applies SiLU to the convolved inputs and reshapes them to x [*B,N,P], b [*B,K,H] and c [*B,K,H] for K groups."""
    lead, groups = convolved["x"].shape[:-1], self.config.num_groups
    x, b, c = (jax.nn.silu(convolved[name]) for name in "xbc")
    return x.reshape(*lead, self.config.num_heads, -1), b.reshape(*lead, groups, -1), c.reshape(*lead, groups, -1)

  def _steps(self, dt):
    """Returns (time steps, log decays), [*B,N] each, from the projection `dt` [*B,N]."""
    dt_bias, decay = (jnp.broadcast_to(x, dt.shape) for x in (self.dt_bias[...], jnp.exp(self.a_log[...])))
    steps = jnp.clip(jax.nn.softplus(dt + dt_bias), self.config.min_step, self.config.max_step)
    return steps, -decay * steps

  def _gate(self, y, inputs, z):
    """Returns norm((y + skip * inputs) * silu(z)), the input of the output projection."""
    y = (y + jnp.broadcast_to(self.skip[...][:, None], inputs.shape) * inputs).reshape(z.shape)
    return self.norm(y * jax.nn.silu(z))

  def _whole(self, projected, segments, real):
    """Computes all positions of a training or prefill batch, from the input projections to the output projection.

    Args:
      projected: Input projections [B,T,…] by name, from `_project`.
      segments: Number of each position's document within its row [B,T].
      real: False at positions that do not change the recurrent state [B,T]; None means that all are True.

    Returns:
      (input of the output projection [B,T,I], recurrent state after the last position [B,N,H,P]).
    """
    inputs, b, c = self._split({name: self.conv[name](projected[name], segments=segments) for name in "xbc"})
    steps, log_decay = self._steps(projected["dt"])
    if real is not None:
      steps, log_decay = (jnp.where(real[..., None], y, 0.0) for y in (steps, log_decay))
    y, recurrent = ssd(inputs * steps[..., None], log_decay=log_decay, b=b, c=c, segments=segments)
    return self._gate(y, inputs, projected["z"]), recurrent

  def qkv(self, x: Float[Array, "B T D"], *, dtype: DTypeLike) -> tuple[Float[Array, "B T I"], ...]:
    """Projects the input to c, b and x of the recurrence, which take the roles of queries, keys and values.

    The results are float32 and not convolved.
    """
    x = x.astype(dtype)
    return tuple(project(x, out=jnp.float32) for project in (self.c, self.b, self.x))

  def __call__(
    self, x: Float[Array, "B T D"], *, segments: Int[Array, "B T"], positions: Int[Array, "B T"], dtype: DTypeLike
  ) -> Float[Array, "B T D"]:
    """Mixes the positions of packed rows; each document starts from an empty state.

    Operands of projections are `dtype`; the result is float32.
    """
    del positions
    # Save only the projections for the backward pass; recompute everything between them.
    y, _ = jax.checkpoint(self._whole)(self._project(x, dtype), segments, None)
    return self.o(y.astype(dtype), out=jnp.float32)

  def init_state(self, batch: int, *, length: int, dtype: DTypeLike) -> Mamba2State:
    """Returns the decoding state of `batch` empty rows.

    `length` and `dtype` are ignored: the state has the same size for any number of positions, and is always float32.
    """
    del length, dtype
    config = self.config
    return Mamba2State(
      windows={name: conv.empty_window(batch) for name, conv in self.conv.items()},
      recurrent=jnp.zeros((batch, config.num_heads, config.state_size, config.head_dim), jnp.float32),
    )

  def prefill(
    self, x: Float[Array, "B T D"], *, lengths: Int[Array, " B"], length: int, dtype: DTypeLike
  ) -> tuple[Float[Array, "B T D"], Mamba2State]:
    """Mixes prompts, of which row b has `lengths[b]` positions and then padding; returns (outputs, decoding state).

    Both are float32. The state of row b is the one that `lengths[b]` calls of `step` would leave. Outputs at padding
    are undefined. `length`, the number of positions that a row may grow to, is ignored: the size of this state does not
    depend on it.
    """
    del length
    projected, real = self._project(x, dtype), jnp.arange(x.shape[1])[None, :] < lengths[:, None]
    y, recurrent = self._whole(projected, jnp.ones(x.shape[:2], jnp.int32), real)
    windows = {name: self.conv[name].window(projected[name], lengths=lengths) for name in "xbc"}
    return self.o(y.astype(dtype), out=jnp.float32), Mamba2State(windows=windows, recurrent=recurrent)

  def step(
    self, x: Float[Array, "B D"], *, state: Mamba2State, positions: Int[Array, " B"], dtype: DTypeLike
  ) -> tuple[Float[Array, "B D"], Mamba2State]:
    """Mixes the next position of each row by one step of the recurrence.

    Returns (output, new decoding state), float32. `positions` is ignored: the recurrence needs no position indices.
    """
    del positions
    projected, convolved, windows = self._project(x, dtype), {}, {}
    for name in "xbc":
      convolved[name], windows[name] = self.conv[name].step(projected[name], window=state.windows[name])
    inputs, b, c = self._split(convolved)
    steps, log_decay = self._steps(projected["dt"])
    b, c = (jnp.repeat(y, self.config.num_heads // self.config.num_groups, axis=1) for y in (b, c))
    written = jnp.einsum("bnh,bnp->bnhp", b, inputs * steps[..., None])
    recurrent = state.recurrent * jnp.exp(log_decay)[..., None, None] + written
    y = self._gate(jnp.einsum("bnhp,bnh->bnp", recurrent, c), inputs, projected["z"])
    return self.o(y.astype(dtype), out=jnp.float32), Mamba2State(windows=windows, recurrent=recurrent)
