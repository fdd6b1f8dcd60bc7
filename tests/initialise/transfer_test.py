import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.errors import InputError
from distill.initialise.importance import measure
from distill.initialise.transfer import from_teacher
from distill.models.config import (
  AttentionConfig,
  DecoderConfig,
  GatedDeltaConfig,
  LayerConfig,
  Mamba2Config,
  MlpConfig,
  MoeConfig,
  RopeConfig,
)
from distill.models.decoder import Decoder
from distill.parallel.mesh import make_mesh
from distill.types import Batch

MLP = MlpConfig(width=24)
OLD = LayerConfig(mixer=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, rope=RopeConfig()), mlp=MLP)
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


def measured(config, params):
  decoder, mesh = Decoder(config), make_mesh()
  tokens = np.random.default_rng(5).integers(0, config.vocab_size, (8, 12)).astype(np.int32)
  segments = np.ones_like(tokens)
  segments[::2, 9:] = 0
  positions = np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape)
  batch = Batch(tokens=tokens, segments=segments, positions=positions, loss_mask=np.ones(tokens.shape, np.float32))
  stacked = {name: jax.device_put(x, decoder.shardings(mesh)[name]) for name, x in decoder.stack(params).items()}
  return measure(decoder, stacked, batches=[batch], mesh=mesh)


def start(teacher_config, teacher, config, layers, importance=None):
  importance = importance or measured(teacher_config, teacher)
  return from_teacher(
    random(config, 1),
    config=config,
    teacher=teacher,
    teacher_config=teacher_config,
    layers=layers,
    importance=importance,
  )


def assert_the_same(config, params, teacher_config, teacher, tolerance=1e-4):
  got, expected = (
    output.readout.logits(output.hidden)
    for output in (run(config, params, whole=True), run(teacher_config, teacher, whole=True))
  )
  np.testing.assert_allclose(got, expected, atol=tolerance * float(jnp.abs(expected).max()))


def test_the_same_architecture_becomes_the_teacher():
  teacher = random(TEACHER, 0)
  made = start(TEACHER, teacher, TEACHER, (0, 1, 2))
  assert set(made.taken) == set(made.params)
  np.testing.assert_array_equal(run(TEACHER, made.params), run(TEACHER, teacher))


def test_a_gated_student_with_offset_norms_computes_what_the_teacher_does():
  new = LayerConfig(
    mixer=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, rope=RopeConfig(), gated=True), mlp=MLP
  )
  config = DecoderConfig(
    family="qwen3_5_text", vocab_size=31, width=16, layers=(new,) * 3, tie_embeddings=True, norm_offset=1.0
  )
  teacher = random(TEACHER, 0)
  params = from_teacher(
    random(config, 1), config=config, teacher=teacher, teacher_config=TEACHER, layers=(0, 1, 2)
  ).params
  np.testing.assert_allclose(run(config, params), run(TEACHER, teacher), atol=1e-5)


def test_a_delta_layer_takes_projections_and_mlp_with_key_heads_repeated():
  new = LayerConfig(
    mixer=GatedDeltaConfig(num_key_heads=4, num_value_heads=4, key_head_dim=8, value_head_dim=8), mlp=MLP
  )
  config = DecoderConfig(family="qwen3_5_text", vocab_size=31, width=16, layers=(new,), tie_embeddings=True)
  teacher = random(TEACHER, 0)
  importance = measured(TEACHER, teacher)
  params = start(TEACHER, teacher, config, (2,), importance).params
  np.testing.assert_array_equal(params["layers.0.mixer.q.kernel"], teacher["layers.2.mixer.q.kernel"])
  np.testing.assert_array_equal(params["layers.0.mixer.k.kernel"][:, 8:16], teacher["layers.2.mixer.k.kernel"][:, :8])
  np.testing.assert_array_equal(params["layers.0.mlp.up.kernel"], teacher["layers.2.mlp.up.kernel"])
  gates = importance.means[2] @ params["layers.0.mixer.z.kernel"]
  np.testing.assert_allclose(jax.nn.silu(gates), 1.0, atol=1e-3)
  lengths = np.linalg.norm(params["layers.0.mixer.o.kernel"].reshape(4, -1), axis=1)
  before = np.linalg.norm(teacher["layers.2.mixer.o.kernel"].reshape(4, -1), axis=1)
  np.testing.assert_allclose(lengths, before * np.sqrt(importance.power[2]), rtol=1e-5)


def test_a_state_space_takes_projections_with_those_of_key_heads_repeated():
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


def test_a_state_space_of_few_groups_takes_the_mean_of_their_keys():
  new = LayerConfig(mixer=Mamba2Config(num_heads=4, head_dim=8, state_size=8, num_groups=1), mlp=MLP)
  config = DecoderConfig(family="bamba", vocab_size=31, width=16, layers=(new,), tie_embeddings=True)
  teacher = random(TEACHER, 0)
  params = start(TEACHER, teacher, config, (2,)).params
  for ours, theirs in (("b", "k"), ("c", "q")):
    mean = teacher[f"layers.2.mixer.{theirs}.kernel"].reshape(16, -1, 8).mean(axis=1)
    np.testing.assert_allclose(params[f"layers.0.mixer.{ours}.kernel"], mean, atol=1e-6)


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
  params = from_teacher(
    random(config, 1), config=config, teacher=teacher, teacher_config=MULTIPLIED, layers=(0, 1, 2)
  ).params
  if gated:
    for i in range(3):
      # The gate's own bias is fresh; at zero it passes a half.
      np.testing.assert_array_equal(params[f"layers.{i}.mixer.q.bias"].reshape(4, 2, 8)[:, 1], 0.0)
  expected, got = (
    output.readout.logits(output.hidden)
    for output in (run(MULTIPLIED, teacher, whole=True), run(config, params, whole=True))
  )
  np.testing.assert_allclose(got, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_a_tied_student_of_a_scaled_teacher_makes_up_for_it_in_its_last_norm():
  teacher = random(MULTIPLIED, 0)
  config = dataclasses.replace(MULTIPLIED, embed_scale=1.0, residual_scale=1.0, logit_scale=1.0)
  params = from_teacher(
    random(config, 1), config=config, teacher=teacher, teacher_config=MULTIPLIED, layers=(0, 1, 2)
  ).params
  expected, got = (
    output.readout.logits(output.hidden)
    for output in (run(MULTIPLIED, teacher, whole=True), run(config, params, whole=True))
  )
  np.testing.assert_allclose(got, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_a_tied_student_with_norms_of_another_kind_cannot_take_a_scaled_embedding():
  config = dataclasses.replace(TEACHER, norm="layer")
  with pytest.raises(InputError, match="tie_word_embeddings"):
    from_teacher(
      random(config, 1), config=config, teacher=random(MULTIPLIED, 0), teacher_config=MULTIPLIED, layers=(0, 1, 2)
    )


def test_norms_of_another_kind_stay_fresh():
  config = dataclasses.replace(TEACHER, norm="layer")
  taken = from_teacher(
    random(config, 1), config=config, teacher=random(TEACHER, 0), teacher_config=TEACHER, layers=(0, 1, 2)
  ).taken
  assert not any(name.endswith("_norm.scale") or name == "norm.scale" for name in taken)
  assert "layers.0.mlp.up.kernel" in taken


def test_a_map_that_does_not_fit_is_refused():
  with pytest.raises(InputError, match="layers_from"):
    from_teacher(random(TEACHER, 1), config=TEACHER, teacher=random(TEACHER, 0), teacher_config=TEACHER, layers=(0, 1))


def test_a_student_wider_than_its_teacher_is_refused():
  config = dataclasses.replace(TEACHER, width=24)
  with pytest.raises(InputError, match="width 24 is above"):
    from_teacher(random(config, 1), config=config, teacher=random(TEACHER, 0), teacher_config=TEACHER, layers=(0, 1, 2))


NORMS = {
  "pre": {},
  "offset, both": {"norms": "both", "norm_offset": 1.0},
  "post": {"norms": "post"},
  "untied, scaled": {"tie_embeddings": False, "embed_scale": 4.0, "logit_scale": 0.5},
}


@pytest.mark.parametrize("changes", NORMS.values(), ids=NORMS)
def test_channels_that_are_zero_are_those_that_go_and_nothing_changes(changes):
  wide = dataclasses.replace(TEACHER, norm_eps=1e-9, **changes)
  teacher = random(wide, 0)
  gone = [1, 6, 7, 12]
  for name, x in teacher.items():
    if name == "embed.table" or name.endswith(("o.kernel", "down.kernel")):
      x = np.array(x)
      x[:, gone] = 0.0
      teacher[name] = x
  narrow = dataclasses.replace(wide, width=12)
  made = start(wide, teacher, narrow, (0, 1, 2))
  np.testing.assert_array_equal(made.channels, np.setdiff1d(np.arange(16), gone))
  assert set(made.taken) == set(made.params)
  assert_the_same(narrow, made.params, wide, teacher)


def test_neurons_that_put_nothing_out_are_those_that_go():
  teacher = random(TEACHER, 0)
  gone = [0, 5, 23]
  for name, x in teacher.items():
    if name.endswith("up.kernel"):
      x = np.array(x)
      x[:, gone] = 0.0
      teacher[name] = x
  config = dataclasses.replace(TEACHER, layers=(dataclasses.replace(OLD, mlp=MlpConfig(width=21)),) * 3)
  made = start(TEACHER, teacher, config, (0, 1, 2))
  np.testing.assert_array_equal(made.retained[1].neurons, np.setdiff1d(np.arange(24), gone))
  assert_the_same(config, made.params, TEACHER, teacher)


def mixed(**changes):
  return dataclasses.replace(OLD, mixer=dataclasses.replace(OLD.mixer, **changes))


@pytest.mark.parametrize(
  "silent, sizes", [((1, 2), (2, 2)), ((0, 1), (2, 1)), ((3,), (3, 3))], ids=["in groups", "a group", "expanded"]
)
@pytest.mark.parametrize("qk_norm", [None, "head"])
def test_heads_that_put_nothing_out_are_those_that_go(silent, sizes, qk_norm):
  """Two key heads serve two query heads each; values are zero for a group, outputs for single heads."""
  wide = dataclasses.replace(TEACHER, layers=(mixed(qk_norm=qk_norm, gated=True),) * 3)
  teacher = random(wide, 0)
  for i in range(3):
    name = f"layers.{i}.mixer.q.kernel"
    gates = np.array(teacher[name]).reshape(16, 4, 2, 8)
    # One token's norm is positive in this channel, so that a gate of its own shuts the head.
    gates[:, list(silent), 1] = 0.0
    gates[0, list(silent), 1] = -1e4
    teacher[name] = gates.reshape(16, -1)
  teacher["embed.table"] = np.array(teacher["embed.table"])
  teacher["embed.table"][:, 0] = 30.0
  config = dataclasses.replace(
    wide, layers=(mixed(num_heads=sizes[0], num_kv_heads=sizes[1], qk_norm=qk_norm, gated=True),) * 3
  )
  made = start(wide, teacher, config, (0, 1, 2))
  assert set(made.retained[1].heads.queries) == set(range(4)) - set(silent)
  assert_the_same(config, made.params, wide, teacher)


def test_a_norm_over_all_heads_is_corrected_for_those_that_go():
  wide = dataclasses.replace(TEACHER, layers=(mixed(qk_norm="full"),) * 3, norm_eps=1e-9)
  teacher = random(wide, 0)
  for i in range(3):
    for name, columns in (("q", 16), ("k", 8), ("v", 8)):
      kernel = np.array(teacher[f"layers.{i}.mixer.{name}.kernel"])
      kernel[:, columns:] = 0.0
      teacher[f"layers.{i}.mixer.{name}.kernel"] = kernel
  config = dataclasses.replace(wide, layers=(mixed(qk_norm="full", num_heads=2, num_kv_heads=1),) * 3)
  made = start(wide, teacher, config, (0, 1, 2))
  assert made.retained[0].heads.queries == (0, 1)
  assert_the_same(config, made.params, wide, teacher)


def test_key_heads_are_repeated_for_a_student_with_more_of_them():
  config = dataclasses.replace(TEACHER, layers=(mixed(num_kv_heads=4),) * 3)
  teacher = random(TEACHER, 0)
  made = start(TEACHER, teacher, config, (0, 1, 2))
  assert_the_same(config, made.params, TEACHER, teacher)


def test_a_wider_mlp_computes_the_teachers():
  config = dataclasses.replace(TEACHER, layers=(dataclasses.replace(OLD, mlp=MlpConfig(width=40)),) * 3)
  teacher = random(TEACHER, 0)
  made = start(TEACHER, teacher, config, (0, 1, 2))
  assert_the_same(config, made.params, TEACHER, teacher)
  assert np.any(made.params["layers.0.mlp.up.kernel"][:, 24:])


@pytest.mark.parametrize("renormalise", [True, False])
def test_experts_as_wide_as_the_mlp_compute_it(renormalise):
  mixture = MoeConfig(width=24, num_experts=4, top_k=4, renormalise=renormalise)
  config = dataclasses.replace(TEACHER, layers=(dataclasses.replace(OLD, mlp=mixture),) * 3)
  teacher = random(TEACHER, 0)
  params = start(TEACHER, teacher, config, (0, 1, 2)).params
  assert_the_same(config, params, TEACHER, teacher)


def test_a_shared_expert_adds_nothing_yet():
  mixture = MoeConfig(width=24, num_experts=4, top_k=2, shared=8)
  config = dataclasses.replace(TEACHER, layers=(dataclasses.replace(OLD, mlp=mixture),) * 3)
  teacher = random(TEACHER, 0)
  assert_the_same(config, start(TEACHER, teacher, config, (0, 1, 2)).params, TEACHER, teacher)


def test_narrow_experts_hold_every_neuron_equally_often():
  config = dataclasses.replace(
    TEACHER, layers=(dataclasses.replace(OLD, mlp=MoeConfig(width=12, num_experts=4, top_k=2)),) * 3
  )
  teacher = random(TEACHER, 0)
  params = start(TEACHER, teacher, config, (0, 1, 2)).params
  kernel = params["layers.1.mlp.experts.down.kernel"]
  whole = 2 * teacher["layers.1.mlp.down.kernel"]
  np.testing.assert_array_equal(kernel.reshape(2, 24, 16), [whole, whole])
  np.testing.assert_array_equal(params["layers.1.mlp.experts.up.kernel"][3], teacher["layers.1.mlp.up.kernel"][:, 12:])


def test_a_layer_that_adds_nothing_is_the_one_left_out():
  teacher = random(TEACHER, 0)
  for name, x in teacher.items():
    if name.startswith("layers.1.") and name.endswith(("o.kernel", "down.kernel")):
      teacher[name] = np.zeros_like(x)
  config = dataclasses.replace(TEACHER, layers=(OLD,) * 2)
  made = start(TEACHER, teacher, config, "importance")
  assert [one.layer for one in made.retained] == [0, 2]
  assert_the_same(config, made.params, TEACHER, teacher)


def test_heads_of_another_width_stay_fresh():
  config = dataclasses.replace(TEACHER, layers=(mixed(head_dim=4),) * 3)
  made = start(TEACHER, random(TEACHER, 0), config, (0, 1, 2))
  assert made.retained[0].heads is None
  assert not any(".mixer." in name for name in made.taken)
  assert "layers.0.mlp.up.kernel" in made.taken
