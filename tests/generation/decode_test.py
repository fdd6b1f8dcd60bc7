import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.errors import InputError
from distill.generation.decode import generate, stream
from distill.generation.sampling import Sampling
from distill.models.config import AttentionConfig, DecoderConfig, GatedDeltaConfig, LayerConfig, MlpConfig, RopeConfig
from distill.models.decoder import Decoder
from tests.kernels.precision import assert_equal_up_to_rounding

FULL = LayerConfig(
  mixer=AttentionConfig(
    num_heads=4, num_kv_heads=2, head_dim=8, rope=RopeConfig(fraction=0.5), gated=True, qk_norm="head"
  ),
  mlp=MlpConfig(width=48),
)
DELTA = LayerConfig(
  mixer=GatedDeltaConfig(num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=8), mlp=MlpConfig(width=48)
)
PROMPTS = [[5, 17, 3, 40], [9], [11, 60, 2, 33, 8, 7, 50, 12, 1, 44, 29, 6, 3, 18, 20, 21, 22], [30, 2]]


@pytest.fixture(scope="module")
def hybrid():
  layers = (DELTA, DELTA, DELTA, FULL, DELTA)
  decoder = Decoder(DecoderConfig(family="qwen3_5_text", vocab_size=61, width=32, layers=layers, norm_offset=1.0))
  key = jax.random.key(0)
  return decoder, {n: x + 0.2 * jax.random.normal(key, x.shape) for n, x in decoder.init(key).items()}


def test_greedy_texts_consist_of_the_most_likely_token_after_each_prefix(hybrid):
  decoder, params = hybrid
  texts = generate(decoder, params=params, prompts=PROMPTS, max_tokens=37)
  length = max(map(len, PROMPTS)) + 37
  rows = [prompt + text for prompt, text in zip(PROMPTS, texts, strict=True)]
  tokens = jnp.asarray([row + [0] * (length - len(row)) for row in rows])
  positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
  output = decoder.apply(params, tokens=tokens, segments=jnp.ones_like(tokens), positions=positions, dtype=jnp.float32)
  best = np.argmax(output.readout.logits(output.hidden), axis=-1)
  for prompt, text, row in zip(PROMPTS, texts, best, strict=True):
    assert text == list(row[len(prompt) - 1 : len(prompt) + 36])


def test_unrolled_and_stacked_parameters_generate_the_same_texts(hybrid):
  decoder, params = hybrid
  unrolled = generate(decoder.unrolled, params=decoder.unroll(params), prompts=PROMPTS, max_tokens=5)
  assert unrolled == generate(decoder, params=params, prompts=PROMPTS, max_tokens=5)


def test_drawn_tokens_depend_only_on_the_seed_the_prompt_and_the_index_of_the_prompt(hybrid):
  decoder, params = hybrid

  def drawn(prompts, seed=1):
    sampling = Sampling(temperature=1.0, top_k=20, top_p=0.9)
    return generate(decoder, params=params, prompts=prompts, max_tokens=12, sampling=sampling, seed=seed)

  texts = drawn(PROMPTS)
  assert drawn(PROMPTS) == texts != drawn(PROMPTS, seed=2)
  assert drawn([PROMPTS[0], [1, 2, 3], [4] * 20])[0] == texts[0]
  assert drawn(PROMPTS[:2]) == texts[:2]
  twice = drawn([[7], [7]])
  assert twice[0] != twice[1]


def test_a_stop_token_ends_only_its_own_text_and_the_stream_ends_with_the_last_text(hybrid):
  decoder, params = hybrid
  whole = generate(decoder, params=params, prompts=PROMPTS, max_tokens=20)
  stop = whole[0][3]
  cut = [text[: text.index(stop)] if stop in text else text for text in whole]
  assert len(cut[0]) <= 3
  assert generate(decoder, params=params, prompts=PROMPTS, max_tokens=20, stop={stop}) == cut
  alone = dict(params=params, prompts=PROMPTS[:1], sampling=Sampling(), stop={stop})
  blocks = list(stream(decoder, max_tokens=1000, **alone))
  assert [token for (row,) in blocks for token in row] == cut[0] and len(blocks) <= 4


def test_the_first_streamed_block_has_one_token_and_all_blocks_together_have_max_tokens(hybrid):
  decoder, params = hybrid
  how = dict(params=params, prompts=PROMPTS, sampling=Sampling())
  blocks = [[len(row) for row in news] for news in stream(decoder, max_tokens=50, **how)]
  assert blocks[:3] == [[1] * 4, [2] * 4, [4] * 4]
  assert sum(row[0] for row in blocks) == 50


def test_the_kv_cache_is_no_longer_than_the_attention_window():
  layer = LayerConfig(
    mixer=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, rope=RopeConfig(), window=5), mlp=None
  )
  decoder = Decoder(DecoderConfig(family="mistral", vocab_size=61, width=16, layers=(layer, layer)))
  params = decoder.init(jax.random.key(0))
  empty = decoder.init_state(params, batch=3, length=900, dtype=jnp.float32)
  tokens = jax.random.randint(jax.random.key(1), (3, 9), 0, 61)
  lengths = jnp.asarray([2, 5, 9])
  _, filled = decoder.prefill(params, tokens=tokens, lengths=lengths, length=900, dtype=jnp.float32)
  assert jax.tree.map(jnp.shape, empty) == jax.tree.map(jnp.shape, filled)
  assert {x.shape for x in jax.tree.leaves(empty)} == {(2, 3, 5, 8)}
  stepped = empty
  for position in range(9):
    at = jnp.full(3, position)
    _, new = decoder.step(params, state=stepped, tokens=tokens[:, position], positions=at, dtype=jnp.float32)
    stepped = jax.tree.map(lambda a, b, at=position: jnp.where(at < lengths[:, None, None], b, a), stepped, new)
  assert_equal_up_to_rounding(filled, stepped, roundings=8 * 2 * (16 + 16 + 5))


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_empty_prompts_are_refused_for_generation(hybrid, prompts):
  decoder, params = hybrid
  with pytest.raises(InputError, match="at least one token"):
    generate(decoder, params=params, prompts=prompts, max_tokens=1)


def test_max_tokens_below_one_is_refused(hybrid):
  decoder, params = hybrid
  with pytest.raises(InputError, match="max_tokens=0"):
    generate(decoder, params=params, prompts=PROMPTS, max_tokens=0)


def test_generation_may_use_the_last_learned_position_and_refuses_to_go_beyond_it(hybrid):
  layer = LayerConfig(mixer=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, rope=None), mlp=None)
  config = DecoderConfig(
    family="gpt2", vocab_size=61, width=16, layers=(layer,), learned_positions=True, max_positions=20
  )
  decoder = Decoder(config)
  params = decoder.init(jax.random.key(0))
  (text,) = generate(decoder, params=params, prompts=[[3] * 17], max_tokens=3)
  assert len(text) == 3
  with pytest.raises(InputError, match="20 positions"):
    generate(decoder, params=params, prompts=[[3] * 17], max_tokens=4)
