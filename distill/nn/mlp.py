"""Multi-layer perceptrons."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from distill.nn.linear import Linear
from distill.nn.param import Init

_tanh_gelu = functools.partial(jax.nn.gelu, approximate=True)
_exact_gelu = functools.partial(jax.nn.gelu, approximate=False)

# By the names in Hugging Face configurations; some are synonyms.
ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
  "silu": jax.nn.silu,
  "swish": jax.nn.silu,
  "gelu": _exact_gelu,
  "gelu_python": _exact_gelu,
  "gelu_new": _tanh_gelu,
  "gelu_fast": _tanh_gelu,
  "gelu_accurate": _tanh_gelu,
  "gelu_pytorch_tanh": _tanh_gelu,
  "gelu_python_tanh": _tanh_gelu,
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "relu": jax.nn.relu,
  "relu2": lambda x: jnp.square(jax.nn.relu(x)),
  "relu6": jax.nn.relu6,
  "leaky_relu": functools.partial(jax.nn.leaky_relu, negative_slope=0.01),
  "hardswish": jax.nn.hard_swish,
  "mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
  "sigmoid": jax.nn.sigmoid,
  "tanh": jnp.tanh,
  "linear": lambda x: x,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpConfig:
  """Configuration of an MLP: down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate.

  Attributes:
    width: Number of neurons F.
    act: Activation, one of `ACTIVATIONS`.
    gated: True for the form with the projection `gate`.
    use_bias: Adds biases to all projections.
  """

  width: int
  act: str = "silu"
  gated: bool = True
  use_bias: bool = False

  kind: ClassVar[str] = "MLP"
  routed: ClassVar[bool] = False

  def build(self, init: Init, *, width: int) -> "Mlp":
    """Makes the module with fresh parameters, for a model of width D = `width`."""
    return Mlp(init, config=self, width=width)


class Mlp(nnx.Module):
  """A multi-layer perceptron, with or without a gate (Shazeer 2020, 2002.05202)."""

  def __init__(self, init: Init, *, config: MlpConfig, width: int):
    wide, narrow, bias = ("embed", "mlp"), ("mlp", "embed"), config.use_bias
    self.config = config
    self.gate = (
      Linear(init.child("gate"), shape=(width, config.width), axes=wide, use_bias=bias) if config.gated else None
    )
    self.up = Linear(init.child("up"), shape=(width, config.width), axes=wide, use_bias=bias)
    self.down = Linear(init.child("down"), shape=(config.width, width), axes=narrow, use_bias=bias)

  def __call__(self, x: Float[Array, "*B D"], *, dtype: DTypeLike) -> Float[Array, "*B D"]:
    """Applies the MLP; operands of projections are `dtype`, and the result is float32."""
    x = x.astype(dtype)
    act, up = ACTIVATIONS[self.config.act], self.up(x).astype(jnp.float32)
    hidden = act(up) if self.gate is None else act(self.gate(x).astype(jnp.float32)) * up
    return self.down(hidden.astype(dtype), out=jnp.float32)

  def balance(self, x: Float[Array, "B T D"], *, valid: Bool[Array, "B T"]) -> None:
    """Returns None: an MLP has no experts whose load could be unbalanced."""
