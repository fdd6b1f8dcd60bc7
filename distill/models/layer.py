"""One residual block: a mixer, an MLP, and their norms."""

import jax.numpy as jnp
from flax import nnx

from distill.models.config import DecoderConfig, LayerConfig
from distill.nn.attention import Attention, AttentionConfig
from distill.nn.gated_delta import GatedDelta, GatedDeltaConfig
from distill.nn.mamba2 import Mamba2, Mamba2Config
from distill.nn.mlp import Mlp, MlpConfig
from distill.nn.moe import Moe, MoeConfig
from distill.nn.norm import LayerNorm, RMSNorm
from distill.nn.param import Init


def _mixer(init: Init, *, layer: LayerConfig, config: DecoderConfig) -> Attention | GatedDelta | Mamba2:
  mixer = layer.mixer
  if isinstance(mixer, AttentionConfig):
    return Attention(init, spec=mixer, width=config.width, norm_eps=config.norm_eps, norm_offset=config.norm_offset)
  if isinstance(mixer, GatedDeltaConfig):
    return GatedDelta(init, spec=mixer, width=config.width, norm_eps=config.norm_eps)
  if isinstance(mixer, Mamba2Config):
    return Mamba2(init, spec=mixer, width=config.width, norm_eps=config.norm_eps)
  raise AssertionError(mixer)


def related_widths(mixer: AttentionConfig | GatedDeltaConfig | Mamba2Config) -> tuple[int, int, int]:
  """Widths of what `Layer.relate` gives of a layer with this mixer."""
  if isinstance(mixer, AttentionConfig):
    keys = mixer.num_kv_heads * mixer.head_dim
    return mixer.num_heads * mixer.head_dim, keys, keys
  if isinstance(mixer, GatedDeltaConfig):
    keys = mixer.num_key_heads * mixer.key_head_dim
    return keys, keys, mixer.num_value_heads * mixer.value_head_dim
  shared = mixer.num_groups * mixer.state_size
  return shared, shared, mixer.num_heads * mixer.head_dim


def block_norm(init: Init, *, config: DecoderConfig) -> RMSNorm | LayerNorm:
  """A norm of the residual stream."""
  if config.norm == "layer":
    return LayerNorm(init, width=config.width, eps=config.norm_eps)
  return RMSNorm(init, width=config.width, eps=config.norm_eps, offset=config.norm_offset)


def _mlp(init: Init, *, spec: MlpConfig | MoeConfig | None, width: int) -> Mlp | Moe | None:
  if spec is None:
    return None
  return Moe(init, spec=spec, width=width) if isinstance(spec, MoeConfig) else Mlp(init, spec=spec, width=width)


class Layer(nnx.Module):
  """x + mixer(x), then x + mlp(x) if there is one, with norms before or after each; the residual stream stays float32.

  Two kinds of layer take float32 operands whatever the dtype of the computation. In a model with routers, rounding
  them moves the residual stream enough to flip choices of experts, each an error of order one (gpt-oss of two to four
  layers: 4 to 10 % of the logits' norm with bf16 operands, 1 to 4 % with them in the experts alone, 0.3 % without). A
  delta rule norms what it reads, however little that is, and with it what was rounded (5 % against 2 % without). A
  state space does not, and rounds like attention (1 %).
  """

  def __init__(self, init: Init, *, layer: LayerConfig, config: DecoderConfig):
    self.scale = config.residual_scale
    self.routed = any(isinstance(one.mlp, MoeConfig) for one in config.layers)
    self.exact_mixer = self.routed or isinstance(layer.mixer, GatedDeltaConfig)

    def norm(name: str, *places: str) -> RMSNorm | LayerNorm | None:
      lacks = layer.mlp is None and name.startswith("mlp")
      return block_norm(init.child(name), config=config) if config.norms in places and not lacks else None

    self.mixer_norm = norm("mixer_norm", "pre", "both")
    self.mixer = _mixer(init.child("mixer"), layer=layer, config=config)
    self.mixer_post_norm = norm("mixer_post_norm", "post", "both")
    self.mlp_norm = norm("mlp_norm", "pre", "both")
    self.mlp = _mlp(init.child("mlp"), spec=layer.mlp, width=config.width)
    self.mlp_post_norm = norm("mlp_post_norm", "post", "both")

  def mixer_dtype(self, dtype):
    """Dtype of the mixer's operands and caches where that of the computation is `dtype`."""
    return jnp.float32 if self.exact_mixer else dtype

  def _scaled(self, y, norm):
    y = y if norm is None else norm(y)
    return y if self.scale == 1.0 else y * self.scale

  def _inner(self, x):
    return x if self.mixer_norm is None else self.mixer_norm(x)

  def _read(self, x):
    return x if self.mlp_norm is None else self.mlp_norm(x)

  def mix(self, x, *, segments, positions, dtype):
    """What the mixer adds to the residual stream; operands of projections are `dtype`."""
    mixed = self.mixer(self._inner(x), segments=segments, positions=positions, dtype=self.mixer_dtype(dtype))
    return self._scaled(mixed, self.mixer_post_norm)

  def relate(self, x, *, segments, positions, dtype):
    """The mixer's queries, keys and values of what the layer is given, float32."""
    del segments, positions
    return self.mixer.related(self._inner(x), dtype=self.mixer_dtype(dtype))

  def feed(self, x, *, dtype):
    """The stream with what the MLP adds to it."""
    if self.mlp is None:
      return x
    dtype = jnp.float32 if self.routed else dtype
    return x + self._scaled(self.mlp(self._read(x), dtype=dtype), self.mlp_post_norm)

  def balance(self, x, *, segments):
    """How evenly each row's tokens use the experts that `feed` would give `x` to; None without a mixture."""
    return self.mlp.balance(self._read(x), valid=segments > 0) if isinstance(self.mlp, Moe) else None

  def __call__(self, x, *, segments, positions, dtype):
    """The block's output."""
    x = x + self.mix(x, segments=segments, positions=positions, dtype=dtype)
    return self.feed(x, dtype=dtype)

  def prefill(self, x, *, lengths, length, dtype):
    """Whole rows of `lengths` positions, and the mixer's cache after them, with room for `length`."""
    mixed, cache = self.mixer.prefill(self._inner(x), lengths=lengths, length=length, dtype=self.mixer_dtype(dtype))
    return self.feed(x + self._scaled(mixed, self.mixer_post_norm), dtype=dtype), cache

  def step(self, x, *, cache, positions, dtype):
    """One position a row, and the mixer's cache after it."""
    mixed, cache = self.mixer.step(self._inner(x), cache=cache, positions=positions, dtype=self.mixer_dtype(dtype))
    return self.feed(x + self._scaled(mixed, self.mixer_post_norm), dtype=dtype), cache
