"""A mixture of experts (MoE) in place of an MLP."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from distill.nn.experts import BIAS_AXES, KERNEL_AXES, ExpertsSpec, mix_experts
from distill.nn.linear import PROJECTION, Linear
from distill.nn.matrix import as_matrix
from distill.nn.mlp import Mlp, MlpConfig
from distill.nn.param import Init, normal, zeros


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
  """Configuration of a mixture of experts (MoE).

  A router chooses `top_k` of `num_experts` gated MLPs for each token; their outputs are added up with weights.

  Attributes:
    width: Number of neurons F of one expert.
    num_experts: Number of experts E.
    top_k: Number of experts per token.
    act: Activation, one of `ACTIVATIONS`.
    renormalise: Rescales the weights of a token's chosen experts to sum to one. If False, a weight is the router's
      softmax over all experts.
    use_bias: Adds biases to the router and to all projections.
    shared: Number of neurons of the shared expert, which every token uses in addition to the chosen ones; None for no
      shared expert.
    shared_gated: Multiplies the shared expert's output by the sigmoid of a projection (Qwen 3 Next).
    clamp: (alpha, limit) of gpt-oss, or None for act(gate) * up. With it, `gate` is clipped to at most `limit`, `up` is
      clipped to [−limit, limit], and the product becomes (1 + up) * gate * sigmoid(alpha * gate).
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
    """Makes the module with fresh parameters, for a model of width D = `width`."""
    return Moe(init, config=self, width=width)


class Experts(nnx.Module):
  """The same projection in all E experts: a kernel [E, I, O] and, if `use_bias`, a bias [E, O]."""

  def __init__(self, init: Init, *, shape: tuple[int, int, int], use_bias: bool):
    # Sharded over experts, not over their widths: each device holds whole experts.
    bias_shape = (shape[0], shape[2])
    self.kernel = init.param("kernel", shape=shape, axes=KERNEL_AXES, init=normal(shape[1] ** -0.5))
    self.bias = init.param("bias", shape=bias_shape, axes=BIAS_AXES, init=zeros) if use_bias else None


class Moe(nnx.Module):
  """A mixture of experts: Σ_e weight_e(x) * expert_e(x), plus the shared expert if there is one.

  Each token is computed by its own experts only, and none is dropped (`mix_experts`). The router computes in float32
  from an unrounded input: rounding would change which experts it chooses for some tokens, and each such change is a
  relative error of order one.
  """

  def __init__(self, init: Init, *, config: MoeConfig, width: int):
    self.config = config
    count, wide, narrow = config.num_experts, (width, config.width), (config.width, width)
    router = init.child("router")
    self.router = nnx.Dict(
      kernel=router.param("kernel", shape=(width, count), axes=("embed", None), init=normal(width**-0.5))
    )
    if config.use_bias:
      self.router["bias"] = router.param("bias", shape=(count,), axes=(None,), init=zeros)
    experts = init.child("experts")
    self.experts = nnx.Dict(
      gate=Experts(experts.child("gate"), shape=(count, *wide), use_bias=config.use_bias),
      up=Experts(experts.child("up"), shape=(count, *wide), use_bias=config.use_bias),
      down=Experts(experts.child("down"), shape=(count, *narrow), use_bias=config.use_bias),
    )
    always = MlpConfig(width=config.shared or 0, act=config.act, use_bias=config.use_bias)
    self.shared = None if config.shared is None else Mlp(init.child("shared"), config=always, width=width)
    gated = config.shared is not None and config.shared_gated
    self.shared_gate = Linear(init.child("shared_gate"), shape=(width, 1), axes=("embed", None)) if gated else None

  def _route(self, x_MD):
    """Returns (the router's probability of each expert [M,E], indices of the chosen experts [M,k])."""
    with jax.default_matmul_precision("highest"):
      logits_ME = as_matrix(self.router["kernel"].get_value()).project(x_MD.astype(jnp.float32))
    if self.config.use_bias:
      logits_ME = logits_ME + self.router["bias"][...][None, :]
    _, chosen_Mk = jax.lax.top_k(logits_ME, self.config.top_k)
    # Saved: what the experts save is of these choices.
    return jax.nn.softmax(logits_ME, axis=-1), checkpoint_name(chosen_Mk, PROJECTION)

  def _is_chosen(self, chosen_Mk):
    """Returns a mask of the chosen experts, [M,k,E]."""
    return jax.nn.one_hot(chosen_Mk, self.config.num_experts, dtype=bool)

  def balance(self, x: Float[Array, "B T D"], *, valid: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """Returns the load imbalance over experts of each row, E/k · Σ_e f_e · P_e, where k is `top_k`.

    f_e is the fraction of the row's tokens that choose expert e, and P_e the mean probability that the router gives e
    (DeepSeek-AI 2024, 2412.19437, section 2.1.2). The value is 1 if tokens spread evenly over the experts, and up to
    E/k if all choose the same k. Gradients flow through P_e only.

    Args:
      x: Input of the mixture of experts.
      valid: False for tokens that do not count, such as padding. A row without valid tokens gets 0.
    """
    probs_ME, chosen_Mk = self._route(x.reshape(-1, x.shape[-1]))
    chosen_ME = self._is_chosen(chosen_Mk).any(axis=1)
    probs_BE, chosen_BE = (
      jnp.sum(jnp.where(valid[..., None], one.astype(jnp.float32).reshape(*x.shape[:2], -1), 0.0), axis=1)
      for one in (probs_ME, chosen_ME)
    )
    count_B = jnp.maximum(jnp.sum(valid, axis=1), 1).astype(jnp.float32)
    return self.config.num_experts / self.config.top_k * jnp.sum(chosen_BE * probs_BE, axis=-1) / jnp.square(count_B)

  def __call__(self, x: Float[Array, "*B D"], *, dtype: DTypeLike) -> Float[Array, "*B D"]:
    """Applies the mixture of experts; operands of the experts are `dtype`, and the result is float32."""
    rows = x.reshape(-1, x.shape[-1])
    probs_ME, chosen = self._route(rows)
    is_chosen = self._is_chosen(chosen)
    weights = jnp.sum(jnp.where(is_chosen, probs_ME[:, None], 0.0), axis=-1)
    if self.config.renormalise:
      weights = weights / jnp.sum(weights, axis=-1, keepdims=True)

    params = {f"{name}.kernel": one.kernel[...] for name, one in self.experts.items()}
    params |= {f"{name}.bias": one.bias[...] for name, one in self.experts.items() if one.bias is not None}
    down_bias = params.pop("down.bias", None)
    static = ExpertsSpec(act=self.config.act, clamp=self.config.clamp, dtype=jnp.dtype(dtype))
    y = mix_experts(rows, params, weights=weights, chosen=chosen, static=static)
    if down_bias is not None:
      weights_ME = jnp.sum(jnp.where(is_chosen, weights[..., None], 0.0), axis=1)
      y = y + jnp.matmul(weights_ME, down_bias, precision=jax.lax.Precision.HIGHEST)
    if self.shared is not None:
      always = self.shared(rows, dtype=dtype)
      y = y + (always if self.shared_gate is None else always * jax.nn.sigmoid(self.shared_gate(rows)))
    return y.reshape(x.shape)
