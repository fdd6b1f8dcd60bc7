import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.generate.sample import sample
from distill.models.config import Attention, DecoderConfig, GatedDelta, LayerConfig, Mlp, Rope
from distill.models.decoder import Decoder

FULL = LayerConfig(
  mixer=Attention(num_heads=4, num_kv_heads=2, head_dim=8, rope=Rope(fraction=0.5), gated=True, qk_norm=True),
  mlp=Mlp(width=48),
)
DELTA = LayerConfig(
  mixer=GatedDelta(num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=8), mlp=Mlp(width=48)
)


@pytest.mark.parametrize("layers", [(FULL, FULL), (DELTA, DELTA, DELTA, FULL, DELTA)], ids=["attention", "hybrid"])
def test_cached_decoding_equals_the_whole_prefix_again(layers):
  decoder = Decoder(DecoderConfig(family="qwen3_5_text", vocab_size=61, width=32, layers=layers, norm_offset=1.0))
  key = jax.random.key(0)
  params = {n: x + 0.2 * jax.random.normal(key, x.shape) for n, x in decoder.init(key).items()}
  prompt = [5, 17, 3, 40]
  drawn = list(sample(decoder, params=params, prompt=prompt, max_tokens=9))
  tokens = jnp.asarray([prompt + drawn])
  output = decoder.apply(
    params,
    tokens=tokens,
    segments=jnp.ones_like(tokens),
    positions=jnp.arange(tokens.shape[1])[None],
    dtype=jnp.float32,
  )
  best = np.argmax(output.readout.logits(output.hidden)[0], axis=-1)
  assert drawn == list(best[len(prompt) - 1 : -1])


def test_draws_depend_on_the_seed_alone():
  decoder = Decoder(DecoderConfig(family="llama", vocab_size=61, width=32, layers=(FULL,)))
  params = decoder.init(jax.random.key(0))

  def draw(seed):
    return list(sample(decoder, params=params, prompt=[1], max_tokens=12, temperature=1.0, seed=seed))

  assert draw(1) == draw(1) != draw(2)
