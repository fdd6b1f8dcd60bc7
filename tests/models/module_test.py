"""Tests of the grouping of layers, of the activations that a decoder captures, and of layers that run in isolation."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distill.models.config import AttentionConfig, LayerConfig, MlpConfig, RopeConfig
from distill.models.layer import Layer
from distill.models.module import groups
from distill.types import INPUT, Capture, before
from tests.objectives.steps import DELTA, SOFT, batch, decoder


def run(given):
  return {"tokens": given.tokens, "segments": given.segments, "positions": given.positions, "dtype": jnp.float32}


def test_an_isolated_layer_gives_the_same_output_as_inside_the_decoder():
  model = decoder(DELTA, SOFT, DELTA, SOFT, DELTA, residual_scale=0.7, norms="both")
  params, given = model.init(jax.random.key(0)), batch()
  every = tuple(range(5))
  whole = model.apply(params, capture=Capture(layers=(INPUT, *every), mixers=every), **run(given))
  common = {name: value for name, value in run(given).items() if name != "tokens"}
  for layers in (every, (3, 0, 2)):
    inputs = [whole.layers[before(layer)] for layer in layers]
    mixed = model.run_isolated(params, run=Layer.mix, inputs=inputs, layers=layers, **common)
    blocks = model.run_isolated(params, run=Layer.__call__, inputs=inputs, layers=layers, **common)
    for place, layer in enumerate(layers):
      np.testing.assert_allclose(mixed[place], whole.mixers[layer], atol=1e-5)
      np.testing.assert_allclose(blocks[place], whole.layers[layer], atol=1e-5)


def test_captured_queries_keys_and_values_are_projections_of_the_layers_normed_input():
  model = decoder(SOFT, SOFT)
  params, given = model.init(jax.random.key(0)), batch()
  output = model.apply(params, capture=Capture(layers=(0,), qkv=(1,)), **run(given))
  q, k, v = output.qkv[1]
  one = model.unstack(params)
  x = output.layers[0]
  x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
  x = x * one["layers.1.mixer_norm.scale"][None, None, :]
  for name, found in zip("qkv", (q, k, v), strict=True):
    np.testing.assert_allclose(found, x @ one[f"layers.1.mixer.{name}.kernel"], atol=1e-5)


def test_only_requested_activations_are_captured():
  model, rows = decoder(SOFT, SOFT), run(batch())
  output = jax.eval_shape(lambda params: model.apply(params, capture=Capture(qkv=(1,)), **rows), model.abstract())
  assert (set(output.layers), set(output.mixers), set(output.qkv)) == (set(), set(), {1})


def test_the_input_of_the_first_layer_is_scaled_token_embeddings_plus_position_embeddings():
  model = decoder(SOFT, embed_scale=2.6457513, round_embed_scale=True, learned_positions=True, max_positions=8)
  params, given = model.init(jax.random.key(0)), batch()
  x = model.module(params).embedded(given.tokens, given.positions, jnp.bfloat16)
  # 2.640625 is 2.6457513 in bfloat16.
  expected = 2.640625 * params["embed.table"][given.tokens] + params["positions.table"][given.positions]
  np.testing.assert_allclose(x, expected, atol=1e-6)


KINDS = tuple(
  LayerConfig(
    mixer=AttentionConfig(num_heads=n, num_kv_heads=1, head_dim=8, rope=RopeConfig()), mlp=MlpConfig(width=16)
  )
  for n in (1, 2, 3)
)


@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=24))
def test_expanding_the_groups_of_layers_gives_back_the_layers_in_order(layers):
  repeated = {}
  for group in groups(layers):
    for repeat in range(group.repeats):
      for position, layer in enumerate(group.pattern):
        repeated[group.layer(repeat, position)] = layer
  assert [repeated[index] for index in range(len(layers))] == layers


def test_a_repeated_pattern_of_layers_is_one_group_and_the_remaining_layers_another():
  a, d, _ = KINDS
  head, rest = groups([d, d, d, a] * 3 + [d])
  assert (head.start, head.pattern, head.repeats) == (0, (d, d, d, a), 3)
  assert (rest.start, rest.pattern, rest.repeats) == (12, (d,), 1)
