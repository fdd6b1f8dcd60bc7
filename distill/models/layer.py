"""One layer of a decoder: a mixer, an MLP, and their norms."""

import jax.numpy as jnp
from flax import nnx

from distill.models.config import DecoderConfig, LayerConfig
from distill.nn.norm import LayerNorm, RMSNorm
from distill.nn.param import Init


def block_norm(init: Init, *, config: DecoderConfig) -> RMSNorm | LayerNorm:
  """Makes a norm over the model width: a `LayerNorm` if `config.norm` is 'layer', else an `RMSNorm`."""
  if config.norm == "layer":
    return LayerNorm(init, width=config.width, eps=config.norm_eps)
  return RMSNorm(init, width=config.width, eps=config.norm_eps, offset=config.norm_offset)


class Layer(nnx.Module):
  """One layer: x + mixer(x), then x + mlp(x) if the layer has an MLP; the residual stream x is float32.

  Norms are applied to the inputs of mixer and MLP, to their outputs, or to both (`DecoderConfig.norms`).

  Args:
    init: Creates the parameters of the module.
    layer: The mixer and the MLP.
    config: The decoder that the layer is part of. If any layer of this decoder has a mixture of experts, the operands
      of all matmuls are float32, because rounding would change the choice of experts.
  """

  def __init__(self, init: Init, *, layer: LayerConfig, config: DecoderConfig):
    self.scale = config.residual_scale
    # Rounded operands change the residual stream enough to flip choices of experts, and each flip is an error of order
    # one: 4 to 10 % of the logits' norm with bfloat16 operands, 0.3 % with float32 ones (gpt-oss, two to four layers).
    self.routed = any(one.mlp is not None and one.mlp.routed for one in config.layers)
    self.exact_mixer = self.routed or layer.mixer.exact_dtype

    def norm(name: str, *places: str) -> RMSNorm | LayerNorm | None:
      lacks = layer.mlp is None and name.startswith("mlp")
      return block_norm(init.child(name), config=config) if config.norms in places and not lacks else None

    self.mixer_norm = norm("mixer_norm", "pre", "both")
    self.mixer = layer.mixer.build(
      init.child("mixer"), width=config.width, norm_eps=config.norm_eps, norm_offset=config.norm_offset
    )
    self.mixer_post_norm = norm("mixer_post_norm", "post", "both")
    self.mlp_norm = norm("mlp_norm", "pre", "both")
    self.mlp = None if layer.mlp is None else layer.mlp.build(init.child("mlp"), width=config.width)
    self.mlp_post_norm = norm("mlp_post_norm", "post", "both")

  def mixer_dtype(self, dtype):
    """Returns the dtype of the mixer's operands and decoding state: float32 if `self.exact_mixer`, else `dtype`."""
    return jnp.float32 if self.exact_mixer else dtype

  def _scaled(self, y, norm):
    y = y if norm is None else norm(y)
    return y if self.scale == 1.0 else y * self.scale

  def _mixer_input(self, x):
    return x if self.mixer_norm is None else self.mixer_norm(x)

  def _mlp_input(self, x):
    return x if self.mlp_norm is None else self.mlp_norm(x)

  def mix(self, x, *, segments, positions, dtype):
    """Returns what the mixer adds to the residual stream, float32 [B,T,D].

    Args:
      x: Residual stream before the layer [B,T,D], float32.
      segments: Number of each position's document [B,T]; 0 marks padding.
      positions: Position within the document [B,T].
      dtype: Dtype of the operands of projections.
    """
    mixed = self.mixer(self._mixer_input(x), segments=segments, positions=positions, dtype=self.mixer_dtype(dtype))
    return self._scaled(mixed, self.mixer_post_norm)

  def qkv(self, x, *, segments, positions, dtype):
    """Returns queries, keys and values of the mixer from the layer's input, float32.

    Args: as `mix`. `segments` and `positions` are ignored; `Decoder.run_isolated` passes them to every method.
    """
    del segments, positions
    return self.mixer.qkv(self._mixer_input(x), dtype=self.mixer_dtype(dtype))

  def feed(self, x, *, dtype):
    """Returns the residual stream after the MLP, or x itself without an MLP; x is the stream after the mixer."""
    if self.mlp is None:
      return x
    dtype = jnp.float32 if self.routed else dtype
    return x + self._scaled(self.mlp(self._mlp_input(x), dtype=dtype), self.mlp_post_norm)

  def balance(self, x, *, segments):
    """Returns the load imbalance over experts of each row [B], or None if the layer has no experts.

    The value is 1 if tokens spread evenly over the experts, and larger if not.

    Args:
      x: Residual stream after the mixer [B,T,D].
      segments: Number of each position's document [B,T]; padding, 0, does not count.
    """
    return None if self.mlp is None else self.mlp.balance(self._mlp_input(x), valid=segments > 0)

  def __call__(self, x, *, segments, positions, dtype):
    """Returns the residual stream after the layer [B,T,D], float32.

    Args: as `mix`.
    """
    x = x + self.mix(x, segments=segments, positions=positions, dtype=dtype)
    return self.feed(x, dtype=dtype)

  def prefill(self, x, *, lengths, length, dtype):
    """Runs prompts; returns (residual stream after the layer [B,T,D], mixer's decoding state).

    Args: as `Mixer.prefill`, but x is the residual stream before the layer.
    """
    mixed, state = self.mixer.prefill(
      self._mixer_input(x), lengths=lengths, length=length, dtype=self.mixer_dtype(dtype)
    )
    return self.feed(x + self._scaled(mixed, self.mixer_post_norm), dtype=dtype), state

  def step(self, x, *, state, positions, dtype):
    """Runs the next position of each row; returns (residual stream after the layer, mixer's decoding state).

    Args: as `Mixer.step`, but `x` is the residual stream before the layer.
    """
    mixed, state = self.mixer.step(
      self._mixer_input(x), state=state, positions=positions, dtype=self.mixer_dtype(dtype)
    )
    return self.feed(x + self._scaled(mixed, self.mixer_post_norm), dtype=dtype), state
