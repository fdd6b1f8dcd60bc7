"""Mixture-of-experts MLP."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from distill.nn.linear import Linear
from distill.nn.matrix import as_matrix
from distill.nn.mlp import ACTIVATIONS, Mlp, MlpConfig
from distill.nn.param import Init, normal, zeros


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
  """A router picks `top_k` of `num_experts` gated MLPs for every token and weighs them.

  Attributes:
    width: Hidden width of one expert.
    renormalise: The weights of the chosen experts sum to one; else they are what the softmax over all gave them.
    use_bias: On the router and on every projection.
    shared: Hidden width of an expert that serves every token beside those chosen, or None.
    shared_gated: It is weighed by sigmoid of a projection (Qwen 3 Next).
    clamp: (alpha, limit) of gpt-oss: (1 + up) * gate * sigmoid(alpha * gate) with both parts clamped, in place of
      act(gate) * up.
  """

  width: int
  num_experts: int
  top_k: int
  act: str = "silu"
  renormalise: bool = True
  use_bias: bool = False
  shared: int | None = None
  shared_gated: bool = False
  clamp: tuple[float, float] | None = None

  kind: ClassVar[str] = "experts"
  routed: ClassVar[bool] = True

  def build(self, init: Init, *, width: int) -> "Moe":
    """Makes the module with fresh parameters, for a model of that width."""
    return Moe(init, spec=self, width=width)


class Experts(nnx.Module):
  """One projection of every expert: a kernel [E, in, out], perhaps with a bias [E, out]."""

  def __init__(self, init: Init, *, shape: tuple[int, int, int], use_bias: bool):
    # Experts, not their widths, are spread over devices: each has its own whole.
    axes, bias_shape = ("experts", "embed", None), (shape[0], shape[2])
    self.kernel = init.param("kernel", shape=shape, axes=axes, init=normal(shape[1] ** -0.5))
    self.bias = init.param("bias", shape=bias_shape, axes=("experts", None), init=zeros) if use_bias else None

  def product(self, x: Float[Array, "..."], *, spelled: str, dtype: DTypeLike) -> Float[Array, "..."]:
    """`x` and the kernel under einsum, float32, with operands in `dtype`."""
    kernel = self.kernel[...].astype(dtype)
    return jnp.einsum(spelled, x.astype(dtype), kernel, preferred_element_type=jnp.float32)


class Moe(nnx.Module):
  """Σ_e weight_e(x) * expert_e(x) plus the shared expert, if any; computed for all experts and masked.

  It is exact, and one dense product a projection: num_experts / top_k of the work of a sorted product, but no token is
  ever dropped or moved. Routing is float32 throughout, from an input that was never rounded: a flipped choice is an
  error of order one.
  """

  def __init__(self, init: Init, *, spec: MoeConfig, width: int):
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
    always = MlpConfig(width=spec.shared or 0, act=spec.act, use_bias=spec.use_bias)
    self.shared = None if spec.shared is None else Mlp(init.child("shared"), spec=always, width=width)
    gated = spec.shared is not None and spec.shared_gated
    self.shared_gate = Linear(init.child("shared_gate"), shape=(width, 1), axes=("embed", None)) if gated else None

  def _route(self, x_TD):
    """(probability of every expert, whether it is chosen), [T,E] each."""
    with jax.default_matmul_precision("highest"):
      logits_TE = as_matrix(self.router["kernel"].get_value()).project(x_TD.astype(jnp.float32))
    if self.spec.use_bias:
      logits_TE = logits_TE + self.router["bias"][...]
    probs_TE = jax.nn.softmax(logits_TE, axis=-1)
    _, chosen = jax.lax.top_k(logits_TE, self.spec.top_k)
    return probs_TE, jax.nn.one_hot(chosen, self.spec.num_experts, dtype=bool).any(axis=-2)

  def weights(self, x_TD: Float[Array, "T D"]) -> Float[Array, "T E"]:
    """Weight of every expert for every token, zero for those not chosen, float32."""
    probs_TE, chosen_TE = self._route(x_TD)
    kept = jnp.where(chosen_TE, probs_TE, 0.0)
    return kept / jnp.sum(kept, axis=-1, keepdims=True) if self.spec.renormalise else kept

  def balance(self, x: Float[Array, "B T D"], *, valid: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """E/k · Σ_e f_e · P_e of each row: 1 where its valid tokens use all experts alike, E/k where they agree on k.

    f_e is the share of the row's tokens that choose expert e, P_e the mean of its probability (DeepSeek-AI 2024,
    2412.19437, section 2.1.2); gradients flow through P alone. 0 for a row without tokens.
    """
    routed = self._route(x.reshape(-1, x.shape[-1]))
    probs_BE, chosen_BE = (
      jnp.sum(jnp.where(valid[..., None], one.reshape(*x.shape[:2], -1), 0.0), axis=1) for one in routed
    )
    count_B = jnp.maximum(jnp.sum(valid, axis=1), 1).astype(jnp.float32)
    return self.spec.num_experts / self.spec.top_k * jnp.sum(chosen_BE * probs_BE, axis=-1) / jnp.square(count_B)

  def _project(self, experts, rows, dtype):
    y_ETF = experts.product(rows, spelled="td,edf->etf", dtype=dtype)
    return y_ETF if experts.bias is None else y_ETF + experts.bias[...][:, None]

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

    gate, up = (self._project(self.experts[name], rows, dtype) for name in ("gate", "up"))
    hidden_ETF = self._gate(gate, up) * weights_TE.T[..., None]
    down = self.experts["down"]
    y = down.product(hidden_ETF, spelled="etf,efd->td", dtype=dtype)
    if down.bias is not None:
      y = y + jnp.matmul(weights_TE, down.bias[...], precision=jax.lax.Precision.HIGHEST)
    if self.shared is not None:
      always = self.shared(rows, dtype=dtype)
      y = y + (always if self.shared_gate is None else always * jax.nn.sigmoid(self.shared_gate(rows)))
    return y.reshape(x.shape)
