"""Tests of the names, shapes and readout of a decoder's parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.errors import InputError
from distill.models.config import AttentionConfig, DecoderConfig, LayerConfig, MlpConfig
from distill.models.decoder import Decoder

ATTENTION = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4, rope=None)
NARROW, WIDE = (LayerConfig(mixer=ATTENTION, mlp=MlpConfig(width=width)) for width in (12, 16))


def decoder(*layers, **changes):
  return Decoder(DecoderConfig(family="toy", vocab_size=7, width=8, layers=layers, **changes))


def random(model):
  rng = np.random.default_rng(0)
  return {name: rng.standard_normal(x.shape, np.float32) for name, x in model.abstract().items()}


@pytest.fixture(scope="module")
def repeated():
  """Returns five layers: a pattern of two, repeated twice, and one different layer."""
  return decoder(NARROW, WIDE, NARROW, WIDE, NARROW)


def test_stacking_unstacked_parameters_restores_the_stacked_ones_bit_for_bit(repeated):
  stacked = random(repeated)
  canonical = repeated.unstack(stacked)
  assert [canonical[f"layers.{i}.mlp.up.kernel"].shape for i in range(5)] == [(8, 12), (8, 16)] * 2 + [(8, 12)]
  jax.tree.map(np.testing.assert_array_equal, repeated.stack(canonical), stacked)


def test_canonical_names_of_a_stacked_parameter_contain_its_layer_numbers_and_its_suffix(repeated):
  assert repeated.canonical("groups.0.1.mlp.up.kernel") == ["layers.1.mlp.up.kernel", "layers.3.mlp.up.kernel"]
  assert repeated.canonical("groups.1.0.mixer.q.kernel.lora_a") == ["layers.4.mixer.q.kernel.lora_a"]
  assert repeated.canonical("embed.table") == ["embed.table"]


def test_canonical_parameters_do_not_depend_on_how_layers_are_grouped(repeated):
  params = random(repeated)
  unrolled = repeated.unroll(params)
  assert {name: x.shape for name, x in unrolled.items()} == {
    name: x.shape for name, x in repeated.unrolled.abstract().items()
  }
  jax.tree.map(np.testing.assert_array_equal, repeated.unrolled.unstack(unrolled), repeated.unstack(params))


def test_every_dimension_of_a_parameter_has_a_logical_axis_and_a_stacks_first_axis_is_layers(repeated):
  axes = repeated.axes()
  assert {name: len(one) for name, one in axes.items()} == {name: x.ndim for name, x in repeated.abstract().items()}
  assert {name for name, one in axes.items() if one[0] == "layers"} == {
    name for name in axes if name.startswith("groups.")
  }


def test_the_readout_is_the_transposed_embedding_table_if_tied_and_otherwise_the_head():
  tied, untied = (decoder(NARROW, tie_embeddings=tie, logit_scale=0.5, logit_softcap=3.0) for tie in (True, False))
  params, others = random(tied), random(untied)
  assert set(others) - set(params) == {"head.kernel"}
  np.testing.assert_array_equal(tied.module(params).readout(jnp.float32).kernel, params["embed.table"].T)
  readout = untied.module(others).readout(jnp.float32)
  np.testing.assert_array_equal(readout.kernel, others["head.kernel"])
  assert (readout.scale, readout.softcap, readout.vocab_size) == (0.5, 3.0, 7)


def test_decoding_more_tokens_than_learned_positions_is_refused():
  model = decoder(NARROW, learned_positions=True, max_positions=4)
  with pytest.raises(InputError, match="prompt and text to draw: 5 tokens are too many.*4 positions"):
    model.init_state(random(model), batch=1, length=5)
