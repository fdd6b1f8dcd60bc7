"""Mixture-of-experts MLP."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from distill.nn.mlp import ACTIVATIONS
from distill.nn.param import Init, normal, zeros


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moe:
  """A router picks `top_k` of `num_experts` gated MLPs for every token and weighs them.

  Attributes:
    width: Hidden width of one expert.
    renormalise: The weights of the chosen experts sum to one; else they are what the softmax over all gave them.
    use_bias: On the router and on every projection.
    clamp: (alpha, limit) of gpt-oss: (1 + up) * gate * sigmoid(alpha * gate) with both parts clamped, in place of
      act(gate) * up.
  """

  width: int
  num_experts: int
  top_k: int
  act: str = "silu"
  renormalise: bool = True
  use_bias: bool = False
  clamp: tuple[float, float] | None = None


class Experts(nnx.Module):
  """One projection of every expert, x[e] @ kernel[e] (+ bias[e])."""

  def __init__(self, init: Init, *, shape: tuple[int, int, int], use_bias: bool):
    # Experts, not their widths, are spread over devices: each has its own whole.
    self.kernel = init.param("kernel", shape=shape, axes=("experts", "embed", None), init=normal(shape[1] ** -0.5))
    bias_shape = (shape[0], shape[2])
    self.bias = init.param("bias", shape=bias_shape, axes=("experts", None), init=zeros) if use_bias else None


class MoeMlp(nnx.Module):
  """Σ_e weight_e(x) * expert_e(x), computed for all experts and masked: exact, and one dense product a projection.

  The work is num_experts / top_k of what a sorted product needs, but no token is ever dropped or moved. Routing is
  float32 throughout, from an input that was never rounded: a flipped choice is an error of order one.
  """

  def __init__(self, init: Init, *, spec: Moe, width: int):
    self.spec = spec
    count, wide, narrow = spec.num_experts, (width, spec.width), (spec.width, width)
    router = init.child("router")
    self.router = nnx.Dict(
      kernel=router.param("kernel", shape=(width, count), axes=("embed", None), init=normal(width**-0.5))
    )
    if spec.use_bias:
      self.router["bias"] = router.param("bias", shape=(count,), axes=(None,), init=zeros)
    experts = init.child("experts")
    self.experts = nnx.Dict(
      gate=Experts(experts.child("gate"), shape=(count, *wide), use_bias=spec.use_bias),
      up=Experts(experts.child("up"), shape=(count, *wide), use_bias=spec.use_bias),
      down=Experts(experts.child("down"), shape=(count, *narrow), use_bias=spec.use_bias),
    )

  def weights(self, x_TD: Float[Array, "T D"]) -> Float[Array, "T E"]:
    """Weight of every expert for every token, zero for those not chosen, float32."""
    logits_TE = jnp.matmul(x_TD.astype(jnp.float32), self.router["kernel"][...], precision=jax.lax.Precision.HIGHEST)
    if self.spec.use_bias:
      logits_TE = logits_TE + self.router["bias"][...]
    probs_TE = jax.nn.softmax(logits_TE, axis=-1)
    _, chosen = jax.lax.top_k(logits_TE, self.spec.top_k)
    kept = jnp.where(jax.nn.one_hot(chosen, self.spec.num_experts, dtype=bool).any(axis=-2), probs_TE, 0.0)
    return kept / jnp.sum(kept, axis=-1, keepdims=True) if self.spec.renormalise else kept

  def _gate(self, gate, up):
    if self.spec.clamp is None:
      return ACTIVATIONS[self.spec.act](gate) * up
    alpha, limit = self.spec.clamp
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(alpha * gate)

  def __call__(self, x: Float[Array, "*B D"], *, dtype: DTypeLike) -> Float[Array, "*B D"]:
    """The mixture, float32; operands of the experts are `dtype`."""
    rows = x.reshape(-1, x.shape[-1])
    weights_TE = self.weights(rows)

    def project(experts, spelled, operand):
      return jnp.einsum(
        spelled, operand.astype(dtype), experts.kernel[...].astype(dtype), preferred_element_type=jnp.float32
      )

    gate, up = (project(self.experts[name], "td,edf->etf", rows) for name in ("gate", "up"))
    if self.spec.use_bias:
      gate, up = gate + self.experts["gate"].bias[...][:, None], up + self.experts["up"].bias[...][:, None]
    hidden_ETF = self._gate(gate, up) * weights_TE.T[..., None]
    y = project(self.experts["down"], "etf,efd->td", hidden_ETF)
    if self.spec.use_bias:
      y = y + jnp.matmul(weights_TE, self.experts["down"].bias[...], precision=jax.lax.Precision.HIGHEST)
    return y.reshape(x.shape)
