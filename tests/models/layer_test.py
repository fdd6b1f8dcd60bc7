import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distill.models.config import AttentionConfig, DecoderConfig, GatedDeltaConfig, LayerConfig, MlpConfig, MoeConfig
from distill.models.layer import Layer
from distill.nn.norm import LayerNorm
from distill.nn.param import Init

ATTENTION = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4, rope=None)
DENSE = LayerConfig(mixer=ATTENTION, mlp=MlpConfig(width=12))
EXPERTS = LayerConfig(mixer=ATTENTION, mlp=MoeConfig(width=4, num_experts=2, top_k=1))
X = jax.random.normal(jax.random.key(1), (1, 5, 8))


def build(layer=DENSE, beside=(), **changes):
  """Returns the module of `layer`, the first of a decoder whose other layers are `beside`."""
  config = DecoderConfig(family="toy", vocab_size=5, width=8, layers=(layer, *beside), norm_eps=1e-12, **changes)
  return Layer(Init(jax.random.key(0)), layer=layer, config=config)


def parts(module, x):
  """Returns what (mixer, MLP) add to the residual stream, each for the input x."""
  segments, positions = jnp.ones(x.shape[:2], int), jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
  mix = jax.jit(lambda x: module.mix(x, segments=segments, positions=positions, dtype=jnp.float32))
  return mix(x), jax.jit(lambda x: module.feed(x, dtype=jnp.float32) - x)(x)


@pytest.mark.parametrize(
  ("norms", "on_input", "on_output"), [("pre", True, False), ("post", False, True), ("both", True, True)]
)
def test_norms_are_applied_to_inputs_outputs_or_both_as_configured(norms, on_input, on_output):
  for added in parts(build(norms=norms), jnp.concatenate([X, 3.0 * X])):
    # An RMS norm of the input removes a factor of the input; one of the output makes its root mean square one.
    assert np.allclose(added[0], added[1], atol=1e-3) == on_input
    assert np.allclose(jnp.sqrt(jnp.mean(added**2, axis=-1)), 1.0, atol=1e-3) == on_output


def test_the_residual_scale_multiplies_the_outputs_of_mixer_and_mlp():
  for plain, scaled in zip(parts(build(), X), parts(build(residual_scale=0.25), X), strict=True):
    np.testing.assert_allclose(scaled, 0.25 * plain, atol=1e-6)


def test_a_layer_without_an_mlp_has_no_mlp_norm_and_its_method_feed_returns_the_input():
  module = build(LayerConfig(mixer=ATTENTION, mlp=None), norms="both")
  assert module.feed(X, dtype=jnp.float32) is X
  assert set(nnx.to_pure_dict(nnx.state(module))) == {"mixer", "mixer_norm", "mixer_post_norm"}


def test_a_layer_uses_the_kind_of_norm_that_its_configuration_names():
  module = build(norm="layer")
  assert isinstance(module.mixer_norm, LayerNorm) and isinstance(module.mlp_norm, LayerNorm)


def test_mixer_operands_are_float32_in_moe_decoders_and_in_gated_delta_mixers():
  delta = LayerConfig(
    mixer=GatedDeltaConfig(num_key_heads=1, num_value_heads=1, key_head_dim=4, value_head_dim=4), mlp=None
  )
  assert build().mixer_dtype(jnp.bfloat16) == jnp.bfloat16
  assert build(beside=(delta,)).mixer_dtype(jnp.bfloat16) == jnp.bfloat16
  assert build(beside=(EXPERTS,)).mixer_dtype(jnp.bfloat16) == jnp.float32
  assert build(delta).mixer_dtype(jnp.bfloat16) == jnp.float32
