"""Gated-delta-rule linear attention, computed in parallel chunks in training and step by step in decoding."""

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
  """Configuration of gated-delta-rule linear attention (Yang et al. 2024, 2412.06464), as in Qwen 3 Next and 3.5.

  Attributes:
    num_key_heads: Number of query and key heads, a divisor of `num_value_heads`. Each is shared by an equal number of
      neighbouring value heads.
    num_value_heads: Number of value heads N.
    key_head_dim: Width H of a query or key.
    value_head_dim: Width P of a value; the state of a head is [H, P].
    conv_width: Number of taps W of the short convolutions.
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
    """Numbers and widths of the value heads and of the key heads that they share."""
    return HeadShape(
      heads=self.num_value_heads,
      key_heads=self.num_key_heads,
      key_width=self.key_head_dim,
      value_width=self.value_head_dim,
    )

  @property
  def qkv_widths(self) -> tuple[int, int, int]:
    """Widths of the queries, keys and values of all heads."""
    keys = self.num_key_heads * self.key_head_dim
    return keys, keys, self.num_value_heads * self.value_head_dim

  def mixing_flops(self, length: int) -> float:
    """Returns the FLOPs of the recurrence at one position: the state is read by the key, written, and read again."""
    del length
    return 6 * self.num_value_heads * self.key_head_dim * self.value_head_dim

  def build(self, init: Init, *, width: int, norm_eps: float, norm_offset: float) -> "GatedDelta":
    """Makes the module; `norm_offset` is ignored, as the gated norm stores its scale without an offset."""
    del norm_offset
    return GatedDelta(init, config=self, width=width, norm_eps=norm_eps)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaState:
  """Decoding state of a gated delta mixer, float32.

  Attributes:
    windows: Name of a convolution -> its last `conv_width` − 1 inputs.
    recurrent: State of each head's recurrence.
  """

  windows: dict[str, Float[Array, "B window _"]]
  recurrent: Float[Array, "B N H P"]


class GatedDelta(nnx.Module):
  """A gated delta mixer: short convolutions, the gated delta rule and a gated norm, as in Qwen 3 Next and 3.5.

  Args:
    init: Creates the parameters of the module.
    config: Architecture.
    width: Model width D.
    norm_eps: Epsilon of the gated norm.
  """

  def __init__(self, init: Init, *, config: GatedDeltaConfig, width: int, norm_eps: float):
    self.config = config
    keys, values = config.num_key_heads * config.key_head_dim, config.num_value_heads * config.value_head_dim
    sizes = {"q": keys, "k": keys, "v": values}

    def project(name: str, out: int, axis: str | None) -> Linear:
      return Linear(init.child(name), shape=(width, out), axes=("embed", axis))

    self.q, self.k, self.v = (project(name, size, "heads") for name, size in sizes.items())
    self.z = project("z", values, "heads")
    self.b = project("b", config.num_value_heads, None)
    self.a = project("a", config.num_value_heads, None)
    self.conv = nnx.Dict(
      {
        name: ShortConv(
          init.child("conv").child(name), width=config.conv_width, channels=size, axis="heads", use_bias=False
        )
        for name, size in sizes.items()
      }
    )
    self.dt_bias = init.param("dt_bias", shape=(config.num_value_heads,), axes=(None,), init=time_step)
    self.a_log = init.param("a_log", shape=(config.num_value_heads,), axes=(None,), init=log_rate(0.01))
    self.norm = RMSNorm(init.child("norm"), width=config.value_head_dim, eps=norm_eps)
    self.o = Linear(init.child("o"), shape=(values, width), axes=("heads", "embed"))

  def _inputs(self, x, dtype):
    """Returns the inputs of the convolutions, [*B, channels] float32, in a dictionary with the keys q, k and v."""
    x = x.astype(dtype)
    return {name: getattr(self, name)(x, out=jnp.float32) for name in self.conv}

  def _heads(self, convolved):
    """Applies SiLU to the convolved inputs; returns q [*B,N,H], k [*B,N,H] and v [*B,N,P], float32.

    Each query and key is divided by its norm, and queries are then multiplied by H^−½.
    """
    config = self.config
    heads = {"q": config.num_key_heads, "k": config.num_key_heads, "v": config.num_value_heads}
    q, k, v = (jax.nn.silu(convolved[name]).reshape(*convolved[name].shape[:-1], heads[name], -1) for name in heads)
    q, k = (x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + _EPS) for x in (q, k))
    q, k = (jnp.repeat(x, config.num_value_heads // config.num_key_heads, axis=-2) for x in (q, k))
    return q * config.key_head_dim**-0.5, k, v

  def _gates(self, x):
    """Returns (log decay, write strength beta), [*B,N] float32 each, from the input x of the mixer."""
    # The input is not rounded: decays multiply over whole documents.
    x = x.astype(jnp.float32)
    a = self.a(x)
    dt_bias, decay = (jnp.broadcast_to(x, a.shape) for x in (self.dt_bias[...], jnp.exp(self.a_log[...])))
    return -decay * jax.nn.softplus(a + dt_bias), jax.nn.sigmoid(self.b(x))

  def _output(self, y, x, dtype):
    z = self.z(x.astype(dtype)).reshape(y.shape).astype(jnp.float32)
    y = (self.norm(y) * jax.nn.silu(z)).astype(dtype)
    return self.o(y.reshape(*x.shape[:-1], -1), out=jnp.float32)

  def _mix(self, x, *, segments, real, dtype):
    """Returns (outputs [B,T,D], inputs of the convolutions, recurrent state after the last position).

    A position with `real` [B,T] False does not change the recurrent state; None means that all are True.
    """
    inputs = self._inputs(x, dtype)
    q, k, v = self._heads({name: self.conv[name](y, segments=segments) for name, y in inputs.items()})
    log_decay, beta = self._gates(x)
    if real is not None:
      log_decay, beta = (jnp.where(real[..., None], gate, 0.0) for gate in (log_decay, beta))
    y, state = gated_delta_rule(q, k, v, log_decay=log_decay, beta=beta, segments=segments)
    return self._output(y, x, dtype), inputs, state

  def qkv(self, x: Float[Array, "B T D"], *, dtype: DTypeLike) -> tuple[Float[Array, "B T I"], ...]:
    """Returns queries, keys and values, each concatenated over heads, float32, before the convolutions."""
    return tuple(self._inputs(x, dtype)[name] for name in "qkv")

  def __call__(
    self, x: Float[Array, "B T D"], *, segments: Int[Array, "B T"], positions: Int[Array, "B T"], dtype: DTypeLike
  ) -> Float[Array, "B T D"]:
    """Mixes the positions of packed rows; each document starts from an empty state.

    Operands of projections are `dtype`; the result is float32.
    """
    del positions
    return self._mix(x, segments=segments, real=None, dtype=dtype)[0]

  def init_state(self, batch: int, *, length: int, dtype: DTypeLike) -> GatedDeltaState:
    """Returns the decoding state of `batch` empty rows.

    `length` and `dtype` are ignored: the state has the same size for any number of positions, and is always float32.
    """
    del length, dtype
    config = self.config
    return GatedDeltaState(
      windows={name: conv.empty_window(batch) for name, conv in self.conv.items()},
      recurrent=jnp.zeros((batch, config.num_value_heads, config.key_head_dim, config.value_head_dim), jnp.float32),
    )

  def prefill(
    self, x: Float[Array, "B T D"], *, lengths: Int[Array, " B"], length: int, dtype: DTypeLike
  ) -> tuple[Float[Array, "B T D"], GatedDeltaState]:
    """Mixes prompts, of which row b has `lengths[b]` positions and then padding; returns (outputs, decoding state).

    Both are float32. The state of row b is the one that `lengths[b]` calls of `step` would leave. Outputs at padding
    are undefined. `length`, the number of positions that a row may grow to, is ignored: the size of this state does not
    depend on it.
    """
    del length
    real = jnp.arange(x.shape[1])[None, :] < lengths[:, None]
    y, inputs, recurrent = self._mix(x, segments=jnp.ones(x.shape[:2], jnp.int32), real=real, dtype=dtype)
    windows = {name: self.conv[name].window(one, lengths=lengths) for name, one in inputs.items()}
    return y, GatedDeltaState(windows=windows, recurrent=recurrent)

  def step(
    self, x: Float[Array, "B D"], *, state: GatedDeltaState, positions: Int[Array, " B"], dtype: DTypeLike
  ) -> tuple[Float[Array, "B D"], GatedDeltaState]:
    """Mixes the next position of each row by one step of the recurrence.

    Returns (output, new decoding state), float32. `positions` is ignored: the recurrence needs no position indices.
    """
    del positions
    convolved, windows = {}, {}
    for name, inputs in self._inputs(x, dtype).items():
      convolved[name], windows[name] = self.conv[name].step(inputs, window=state.windows[name])
    q, k, v = self._heads(convolved)
    log_decay, beta = self._gates(x)
    recurrent = state.recurrent * jnp.exp(log_decay)[..., None, None]
    error = (v - jnp.einsum("bnhp,bnh->bnp", recurrent, k)) * beta[..., None]
    recurrent = recurrent + jnp.einsum("bnh,bnp->bnhp", k, error)
    y = jnp.einsum("bnhp,bnh->bnp", recurrent, q)
    return self._output(y, x, dtype), GatedDeltaState(windows=windows, recurrent=recurrent)
