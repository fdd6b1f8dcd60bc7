import dataclasses

import jax
import numpy as np
import pytest

from distill.models.config import (
  AttentionConfig,
  DecoderConfig,
  GatedDeltaConfig,
  LayerConfig,
  Mamba2Config,
  RopeConfig,
)
from tests.initialise.students import MLP, TEACHER, assert_equal_logits, measured, random, start, with_mixer


def test_a_student_with_gated_attention_and_norm_offsets_computes_its_teachers_logits():
  new = LayerConfig(
    mixer=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, rope=RopeConfig(), gated=True), mlp=MLP
  )
  config = DecoderConfig(
    family="qwen3_5_text", vocab_size=31, width=16, layers=(new,) * 3, tie_embeddings=True, norm_offset=1.0
  )
  teacher = random(TEACHER, 0)
  assert_equal_logits(config, start(TEACHER, teacher, config).params, TEACHER, teacher)


def test_a_gated_delta_mixer_takes_projections_from_attention_with_key_heads_repeated():
  new = LayerConfig(
    mixer=GatedDeltaConfig(num_key_heads=4, num_value_heads=4, key_head_dim=8, value_head_dim=8), mlp=MLP
  )
  config = DecoderConfig(family="qwen3_5_text", vocab_size=31, width=16, layers=(new,), tie_embeddings=True)
  teacher = random(TEACHER, 0)
  importance, params = measured(TEACHER, teacher), start(TEACHER, teacher, config, (2,)).params
  np.testing.assert_array_equal(params["layers.0.mixer.q.kernel"], teacher["layers.2.mixer.q.kernel"])
  np.testing.assert_array_equal(params["layers.0.mixer.k.kernel"][:, 8:16], teacher["layers.2.mixer.k.kernel"][:, :8])
  np.testing.assert_array_equal(params["layers.0.mlp.up.kernel"], teacher["layers.2.mlp.up.kernel"])
  gates = importance.means[2] @ params["layers.0.mixer.z.kernel"]
  np.testing.assert_allclose(jax.nn.silu(gates), 1.0, atol=1e-3)
  lengths = np.linalg.norm(params["layers.0.mixer.o.kernel"].reshape(4, -1), axis=1)
  before = np.linalg.norm(teacher["layers.2.mixer.o.kernel"].reshape(4, -1), axis=1)
  np.testing.assert_allclose(lengths, before * np.sqrt(importance.power[2]), rtol=1e-5)


def test_a_mamba2_mixer_takes_projections_from_attention_with_key_heads_repeated():
  new = LayerConfig(mixer=Mamba2Config(num_heads=4, head_dim=8, state_size=8, num_groups=4), mlp=MLP)
  config = DecoderConfig(family="bamba", vocab_size=31, width=16, layers=(new,), tie_embeddings=True)
  teacher = random(TEACHER, 0)
  made = start(TEACHER, teacher, config, (2,))
  params = made.params
  np.testing.assert_array_equal(params["layers.0.mixer.c.kernel"], teacher["layers.2.mixer.q.kernel"])
  for ours, theirs in (("b", "k"), ("x", "v")):
    kernel = params[f"layers.0.mixer.{ours}.kernel"]
    np.testing.assert_array_equal(kernel[:, 8:16], teacher[f"layers.2.mixer.{theirs}.kernel"][:, :8])
    np.testing.assert_array_equal(params[f"layers.0.mixer.conv.{ours}.kernel"][-1], 1.0)
  assert not {f"layers.0.mixer.{name}" for name in ("dt.kernel", "a_log")} & set(made.taken)


def test_a_mamba2_mixer_with_fewer_groups_than_key_heads_takes_the_mean_of_key_heads():
  new = LayerConfig(mixer=Mamba2Config(num_heads=4, head_dim=8, state_size=8, num_groups=1), mlp=MLP)
  config = DecoderConfig(family="bamba", vocab_size=31, width=16, layers=(new,), tie_embeddings=True)
  teacher = random(TEACHER, 0)
  params = start(TEACHER, teacher, config, (2,)).params
  for ours, theirs in (("b", "k"), ("c", "q")):
    mean = teacher[f"layers.2.mixer.{theirs}.kernel"].reshape(16, -1, 8).mean(axis=1)
    np.testing.assert_allclose(params[f"layers.0.mixer.{ours}.kernel"], mean, atol=1e-6)


@pytest.mark.parametrize(
  "silent, sizes", [((1, 2), (2, 2)), ((0, 1), (2, 1)), ((3,), (3, 3))], ids=["in groups", "a group", "expanded"]
)
@pytest.mark.parametrize("qk_norm", [None, "head"])
def test_attention_heads_with_zero_output_are_removed_first(silent, sizes, qk_norm):
  wide = dataclasses.replace(TEACHER, layers=(with_mixer(qk_norm=qk_norm, gated=True),) * 3)
  teacher = random(wide, 0)
  for i in range(3):
    name = f"layers.{i}.mixer.q.kernel"
    gates = np.array(teacher[name]).reshape(16, 4, 2, 8)
    # Channel 0 is large and positive for every token, so that a negative weight of a gate closes its head.
    gates[:, list(silent), 1] = 0.0
    gates[0, list(silent), 1] = -1e4
    teacher[name] = gates.reshape(16, -1)
  teacher["embed.table"] = np.array(teacher["embed.table"])
  teacher["embed.table"][:, 0] = 30.0
  config = dataclasses.replace(
    wide, layers=(with_mixer(num_heads=sizes[0], num_kv_heads=sizes[1], qk_norm=qk_norm, gated=True),) * 3
  )
  made = start(wide, teacher, config)
  assert set(made.retained[1].heads.queries) == set(range(4)) - set(silent)
  assert_equal_logits(config, made.params, wide, teacher)


def test_a_norm_over_all_heads_is_corrected_for_removed_heads():
  wide = dataclasses.replace(TEACHER, layers=(with_mixer(qk_norm="full"),) * 3, norm_eps=1e-9)
  teacher = random(wide, 0)
  for i in range(3):
    for name, columns in (("q", 16), ("k", 8), ("v", 8)):
      kernel = np.array(teacher[f"layers.{i}.mixer.{name}.kernel"])
      kernel[:, columns:] = 0.0
      teacher[f"layers.{i}.mixer.{name}.kernel"] = kernel
  config = dataclasses.replace(wide, layers=(with_mixer(qk_norm="full", num_heads=2, num_kv_heads=1),) * 3)
  made = start(wide, teacher, config)
  assert made.retained[0].heads.queries == (0, 1)
  assert_equal_logits(config, made.params, wide, teacher)


def test_key_heads_are_repeated_for_a_student_with_more_key_heads():
  config = dataclasses.replace(TEACHER, layers=(with_mixer(num_kv_heads=4),) * 3)
  teacher = random(TEACHER, 0)
  made = start(TEACHER, teacher, config)
  assert_equal_logits(config, made.params, TEACHER, teacher)


def test_a_mixer_with_another_head_width_than_the_teachers_keeps_its_initial_values():
  config = dataclasses.replace(TEACHER, layers=(with_mixer(head_dim=4),) * 3)
  made = start(TEACHER, random(TEACHER, 0), config)
  assert made.retained[0].heads is None
  assert not any(".mixer." in name for name in made.taken)
  assert "layers.0.mlp.up.kernel" in made.taken
