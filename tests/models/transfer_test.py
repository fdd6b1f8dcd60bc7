import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.errors import InputError
from distill.models.config import Attention, DecoderConfig, GatedDelta, LayerConfig, Mlp, Rope
from distill.models.decoder import Decoder
from distill.models.transfer import from_teacher

MLP = Mlp(width=24)
OLD = LayerConfig(mixer=Attention(num_heads=4, num_kv_heads=2, head_dim=8, rope=Rope()), mlp=MLP)
TEACHER = DecoderConfig(family="llama", vocab_size=31, width=16, layers=(OLD,) * 3, tie_embeddings=True)


def run(config, params):
  decoder = Decoder(config)
  tokens = jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6]])
  rows = {"tokens": tokens, "segments": jnp.ones_like(tokens), "positions": jnp.arange(8)[None]}
  return decoder.apply(decoder.stack(params), **rows, dtype=jnp.float32).hidden


def random(config, seed):
  decoder = Decoder(config)
  key = jax.random.key(seed)
  params = {name: x + 0.1 * jax.random.normal(key, x.shape) for name, x in decoder.init(key).items()}
  return decoder.unstack(jax.device_get(params))


def test_the_same_architecture_becomes_the_teacher():
  teacher = random(TEACHER, 0)
  params, taken = from_teacher(
    random(TEACHER, 1), config=TEACHER, teacher=teacher, teacher_config=TEACHER, layers=(0, 1, 2)
  )
  assert set(taken) == set(params)
  np.testing.assert_array_equal(run(TEACHER, params), run(TEACHER, teacher))


def test_a_gated_student_with_offset_norms_computes_what_the_teacher_does():
  new = LayerConfig(mixer=Attention(num_heads=4, num_kv_heads=2, head_dim=8, rope=Rope(), gated=True), mlp=MLP)
  config = DecoderConfig(
    family="qwen3_5_text", vocab_size=31, width=16, layers=(new,) * 3, tie_embeddings=True, norm_offset=1.0
  )
  teacher = random(TEACHER, 0)
  params, _ = from_teacher(random(config, 1), config=config, teacher=teacher, teacher_config=TEACHER, layers=(0, 1, 2))
  np.testing.assert_allclose(run(config, params), run(TEACHER, teacher), atol=1e-5)


def test_a_delta_layer_takes_projections_and_mlp_with_key_heads_repeated():
  new = LayerConfig(mixer=GatedDelta(num_key_heads=4, num_value_heads=4, key_head_dim=8, value_head_dim=8), mlp=MLP)
  config = DecoderConfig(family="qwen3_5_text", vocab_size=31, width=16, layers=(new,), tie_embeddings=True)
  teacher = random(TEACHER, 0)
  params, taken = from_teacher(random(config, 1), config=config, teacher=teacher, teacher_config=TEACHER, layers=(2,))
  kernel = params["layers.0.mixer.qkv.kernel"]
  np.testing.assert_array_equal(kernel[:, :32], teacher["layers.2.mixer.q.kernel"])
  np.testing.assert_array_equal(kernel[:, 40:48], teacher["layers.2.mixer.k.kernel"][:, :8])
  np.testing.assert_array_equal(params["layers.0.mlp.up.kernel"], teacher["layers.2.mlp.up.kernel"])
  assert "layers.0.mixer.z.kernel" not in taken


def test_a_map_that_does_not_fit_is_refused():
  with pytest.raises(InputError, match="layers_from"):
    from_teacher(random(TEACHER, 1), config=TEACHER, teacher=random(TEACHER, 0), teacher_config=TEACHER, layers=(0, 1))
