import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.errors import InputError
from distill.models.config import Attention, DecoderConfig, GatedDelta, LayerConfig, Mamba2, Mlp, Rope
from distill.models.decoder import Decoder
from distill.models.transfer import from_teacher

MLP = Mlp(width=24)
OLD = LayerConfig(mixer=Attention(num_heads=4, num_kv_heads=2, head_dim=8, rope=Rope()), mlp=MLP)
TEACHER = DecoderConfig(family="llama", vocab_size=31, width=16, layers=(OLD,) * 3, tie_embeddings=True)


def run(config, params, whole=False):
  decoder = Decoder(config)
  tokens = jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6]])
  rows = {"tokens": tokens, "segments": jnp.ones_like(tokens), "positions": jnp.arange(8)[None]}
  output = decoder.apply(decoder.stack(params), **rows, dtype=jnp.float32)
  return output if whole else output.hidden


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
  np.testing.assert_array_equal(params["layers.0.mixer.q.kernel"], teacher["layers.2.mixer.q.kernel"])
  np.testing.assert_array_equal(params["layers.0.mixer.k.kernel"][:, 8:16], teacher["layers.2.mixer.k.kernel"][:, :8])
  np.testing.assert_array_equal(params["layers.0.mlp.up.kernel"], teacher["layers.2.mlp.up.kernel"])
  assert "layers.0.mixer.z.kernel" not in taken


def test_a_state_space_takes_projections_with_those_of_key_heads_repeated():
  new = LayerConfig(mixer=Mamba2(num_heads=4, head_dim=8, state_size=8, num_groups=4), mlp=MLP)
  config = DecoderConfig(family="bamba", vocab_size=31, width=16, layers=(new,), tie_embeddings=True)
  teacher = random(TEACHER, 0)
  params, taken = from_teacher(random(config, 1), config=config, teacher=teacher, teacher_config=TEACHER, layers=(2,))
  np.testing.assert_array_equal(params["layers.0.mixer.c.kernel"], teacher["layers.2.mixer.q.kernel"])
  for ours, theirs in (("b", "k"), ("x", "v")):
    kernel = params[f"layers.0.mixer.{ours}.kernel"]
    np.testing.assert_array_equal(kernel[:, 8:16], teacher[f"layers.2.mixer.{theirs}.kernel"][:, :8])
    np.testing.assert_array_equal(params[f"layers.0.mixer.conv.{ours}.kernel"][-1], 1.0)
  np.testing.assert_array_equal(params["layers.0.mixer.o.kernel"], teacher["layers.2.mixer.o.kernel"])
  assert not {f"layers.0.mixer.{name}" for name in ("z.kernel", "dt.kernel", "a_log", "skip")} & set(taken)


MULTIPLIED = dataclasses.replace(
  TEACHER,
  layers=(dataclasses.replace(OLD, mixer=dataclasses.replace(OLD.mixer, scale=0.7, use_bias=True)),) * 3,
  embed_scale=5.0,
  residual_scale=0.3,
  logit_scale=0.25,
)


@pytest.mark.parametrize("gated", [False, True])
def test_multipliers_of_the_teacher_are_worked_into_a_student_without_them(gated):
  mixer = dataclasses.replace(OLD.mixer, use_bias=True, gated=gated)
  config = dataclasses.replace(TEACHER, layers=(LayerConfig(mixer=mixer, mlp=MLP),) * 3, tie_embeddings=False)
  teacher = random(MULTIPLIED, 0)
  params, _ = from_teacher(
    random(config, 1), config=config, teacher=teacher, teacher_config=MULTIPLIED, layers=(0, 1, 2)
  )
  if gated:
    for i in range(3):
      # The gate's own bias is fresh; at zero it passes a half.
      np.testing.assert_array_equal(params[f"layers.{i}.mixer.q.bias"].reshape(4, 2, 8)[:, 1], 0.0)
  expected, got = (
    output.readout.logits(output.hidden)
    for output in (run(MULTIPLIED, teacher, whole=True), run(config, params, whole=True))
  )
  np.testing.assert_allclose(got, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_a_tied_student_cannot_take_a_scaled_embedding():
  with pytest.raises(InputError, match="tie_word_embeddings"):
    from_teacher(
      random(TEACHER, 1), config=TEACHER, teacher=random(MULTIPLIED, 0), teacher_config=MULTIPLIED, layers=(0, 1, 2)
    )


def test_norms_of_another_kind_stay_fresh():
  config = dataclasses.replace(TEACHER, norm="layer")
  fresh = random(config, 1)
  params, taken = from_teacher(
    fresh, config=config, teacher=random(TEACHER, 0), teacher_config=TEACHER, layers=(0, 1, 2)
  )
  assert not any(name.endswith("_norm.scale") or name == "norm.scale" for name in taken)
  assert "layers.0.mlp.up.kernel" in taken


def test_a_map_that_does_not_fit_is_refused():
  with pytest.raises(InputError, match="layers_from"):
    from_teacher(random(TEACHER, 1), config=TEACHER, teacher=random(TEACHER, 0), teacher_config=TEACHER, layers=(0, 1))
