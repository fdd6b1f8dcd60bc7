import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.models.config import AttentionConfig, DecoderConfig, LayerConfig, MlpConfig, RopeConfig
from distill.models.decoder import Decoder
from distill.nn.moe import MoeConfig

MIXER = AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8, rope=RopeConfig())
DENSE = LayerConfig(mixer=MIXER, mlp=MlpConfig(width=24))
SPARSE = LayerConfig(mixer=MIXER, mlp=MoeConfig(width=8, num_experts=4, top_k=2, shared=8, shared_gated=True))


def balance(layers, tokens, lengths):
  decoder = Decoder(DecoderConfig(family="qwen3_moe", vocab_size=31, width=16, layers=layers))
  segments = (jnp.arange(tokens.shape[1])[None, :] < jnp.asarray(lengths)[:, None]).astype(jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  params = decoder.init(jax.random.key(0))
  return decoder.apply(params, tokens=jnp.asarray(tokens), segments=segments, positions=positions).balance


@pytest.mark.parametrize("layers", [(SPARSE,), (DENSE, SPARSE, DENSE, SPARSE, SPARSE)], ids=["one", "some"])
def test_the_expert_balance_of_a_row_does_not_depend_on_the_other_rows(layers):
  tokens = np.random.default_rng(0).integers(0, 31, (3, 12))
  together = balance(layers, tokens, [12, 7, 0])
  assert together.shape == (3,) and together[2] == 0.0
  np.testing.assert_allclose(together[:1], balance(layers, tokens[:1], [12]), rtol=1e-5)
  np.testing.assert_allclose(together[1:2], balance(layers, tokens[1:2, :7], [7]), rtol=1e-5)
  assert 0.5 < together[0] < 2.0


def test_the_expert_balance_of_a_decoder_without_experts_is_none():
  assert balance((DENSE,), np.zeros((1, 4), int), [4]) is None
