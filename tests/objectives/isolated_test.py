"""Student layers that are fed the teacher's inputs: the first two stages of a conversion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.errors import InputError
from distill.jobs.models import Models
from distill.jobs.stages import read_stages
from distill.models.config import AttentionConfig, DecoderConfig, GatedDeltaConfig, LayerConfig, MlpConfig, RopeConfig
from distill.models.decoder import Decoder
from distill.models.layer import Layer
from distill.nn.mamba2 import Mamba2Config
from distill.objectives.objective import initial_states
from distill.objectives.terms import build_terms, demands
from distill.parallel.mesh import make_mesh
from distill.teachers.live import LiveTeacher
from distill.training.config import OptimizerConfig, StageConfig
from distill.training.optimizer import make_optimizer, multipliers
from distill.training.step import StepConfig, TrainState, canonical_names, make_step
from distill.types import INPUT, Batch, Capture, before

MLP = MlpConfig(width=24)
SOFT = LayerConfig(mixer=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, rope=RopeConfig(theta=1e4)), mlp=MLP)
DELTA = LayerConfig(
  mixer=GatedDeltaConfig(num_key_heads=2, num_value_heads=2, key_head_dim=8, value_head_dim=8), mlp=MLP
)


def decoder(*layers, **changes):
  return Decoder(DecoderConfig(family="llama", vocab_size=31, width=16, layers=layers, **changes))


def batch(rows=2):
  rng = np.random.default_rng(0)
  segments = jnp.asarray(np.repeat([[1, 2, 0]], [7, 6, 2], axis=1).repeat(rows, 0))
  positions = jnp.asarray(np.concatenate([np.arange(7), np.arange(6), np.arange(2)])[None].repeat(rows, 0))
  mask = jnp.asarray((np.asarray(segments) > 0).astype(np.float32))
  tokens = jnp.asarray(rng.integers(0, 31, segments.shape))
  return Batch(tokens=tokens, segments=segments, positions=positions, loss_mask=mask)


def run(given):
  return {"tokens": given.tokens, "segments": given.segments, "positions": given.positions, "dtype": jnp.float32}


def test_a_layer_fed_what_its_own_model_feeds_it_gives_what_it_gives_there():
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


def trained(student, params, *, terms, teacher, steps, train=((".*", 1.0),)):
  """(parameters, loss of the first step, of the last) after `steps` on one batch."""
  mesh = make_mesh((-1, 1, 1))
  names = canonical_names(student, params)
  factors = multipliers(train, names=names, what="train")
  mine = {name: x for name, x in params.items() if np.any(factors[name])}
  factors = {name: factors[name] for name in mine}
  optimizer = make_optimizer(
    OptimizerConfig(learning_rate=1e-2),
    trained=factors,
    names={name: names[name] for name in mine},
    key="optimizer",
    steps=steps,
  )
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  state = TrainState(
    trained=mine,
    frozen={name: x for name, x in params.items() if name not in mine},
    optimizer=optimizer.init(mine),
    step=jnp.zeros((), jnp.int32),
    terms=initial_states(terms),
  )
  state = jax.device_put(jax.tree.map(np.array, state), everywhere)
  shardings = jax.tree.map(lambda x: x.sharding, state)
  config = StepConfig(terms=terms, steps=steps, dtype=jnp.float32)
  step = make_step(student, teacher=teacher, optimizer=optimizer, mesh=mesh, state_shardings=shardings, config=config)
  given, losses = batch(8), []
  teacher_params = jax.device_put(dict(teacher.params), everywhere)
  for _ in range(steps):
    state, metrics = step(state, teacher_params, given)
    losses.append(float(metrics["loss"]))
  return state.params, losses


@pytest.mark.parametrize("kind", ["mixer_output", "block_output"])
def test_alignment_trains_what_it_is_told_to_and_nothing_else(kind):
  student, model = decoder(DELTA, DELTA), decoder(SOFT, SOFT, SOFT, SOFT)
  teacher = LiveTeacher(decoder=model, params=model.init(jax.random.key(1)))
  terms = build_terms([{"kind": kind}], key="terms", steps=30, layers_from=(0, 2), depths=(2, 4))
  assert not demands(terms).output
  params = {f"student.{name}": x for name, x in student.init(jax.random.key(0)).items()}
  after, losses = trained(
    student,
    params,
    terms=terms,
    teacher=teacher,
    steps=30,
    train=((r"student\.layers\..*\.mixer\..*", 1.0), (".*", 0.0)),
  )
  assert losses[-1] < 0.8 * losses[0]
  for name, value in params.items():
    assert np.array_equal(value, after[name]) != (".mixer." in name), name


def test_a_student_that_is_its_teacher_is_aligned():
  model = decoder(SOFT, SOFT, SOFT)
  weights = model.init(jax.random.key(1))
  terms = build_terms(
    [{"kind": "mixer_output"}, {"kind": "block_output"}, {"kind": "relations", "heads": 4}],
    key="terms",
    steps=1,
    layers_from=(0, 1, 2),
    depths=(3, 3),
  )
  params = {f"student.{name}": x for name, x in weights.items()}
  _, losses = trained(model, params, terms=terms, teacher=LiveTeacher(decoder=model, params=weights), steps=1)
  assert losses[0] < 1e-9


@pytest.mark.parametrize("mixer", ["attention", "gated_delta", "mamba2"])
def test_relations_train_a_student_of_other_widths_and_other_mixers(mixer):
  state_space = LayerConfig(mixer=Mamba2Config(num_heads=2, head_dim=8, state_size=8), mlp=MLP)
  layer = {"attention": SOFT, "gated_delta": DELTA, "mamba2": state_space}[mixer]
  student = decoder(layer, layer)
  model = Decoder(DecoderConfig(family="llama", vocab_size=31, width=24, layers=(SOFT, SOFT, SOFT)))
  teacher = LiveTeacher(decoder=model, params=model.init(jax.random.key(1)))
  terms = build_terms([{"kind": "relations", "pairs": ((1, 2),), "heads": 4}], key="terms", steps=40, depths=(2, 3))
  params = {f"student.{name}": x for name, x in student.init(jax.random.key(0)).items()}
  after, losses = trained(student, params, terms=terms, teacher=teacher, steps=40)
  assert losses[-1] < 0.5 * losses[0]
  # What comes after the compared layer's projections has no part in it.
  untouched = [name for name in params if ".mlp." in name or name.endswith("o.kernel")]
  assert untouched and all(np.array_equal(params[name][1], after[name][1]) for name in untouched)


def test_relation_heads_divide_what_both_models_project():
  model = decoder(SOFT, SOFT)
  models = Models(student=decoder(DELTA), params={}, teacher=LiveTeacher(decoder=model, params={}), adapter_scale=1.0)
  terms = [{"kind": "relations", "pairs": ((0, 1),), "heads": 16}]
  stage = StageConfig(name="only", steps=1, terms=tuple(terms))
  with pytest.raises(
    InputError, match=r"terms\[0\]\.heads: 16 relation heads do not divide the teacher's .* 16, 8, 8 wide"
  ):
    read_stages([stage], models)


def test_what_relates_are_the_projections_of_what_a_layer_is_given():
  model = decoder(SOFT, SOFT)
  params, given = model.init(jax.random.key(0)), batch()
  output = model.apply(params, capture=Capture(layers=(0,), qkv=(1,)), **run(given))
  q, k, v = output.qkv[1]
  one = model.unstack(params)
  x = output.layers[0]
  x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6) * one["layers.1.mixer_norm.scale"]
  for name, found in zip("qkv", (q, k, v), strict=True):
    np.testing.assert_allclose(found, x @ one[f"layers.1.mixer.{name}.kernel"], atol=1e-5)


def test_pairs_follow_from_the_layers_that_the_student_starts_from():
  def pairs(kind, layers_from):
    return build_terms([{"kind": kind}], key="terms", steps=1, layers_from=layers_from, depths=(3, 8))[0].pairs

  assert pairs("mixer_output", (1, 3, 6)) == ((0, 1), (1, 3), (2, 6))
  assert pairs("block_output", (1, 3, 6)) == ((0, 0, 2), (1, 3, 5), (2, 6, 7))
  assert pairs("hidden", (1, 3, 6)) == ((0, 2), (1, 5), (2, 7))
  with pytest.raises(InputError, match=r"terms\[0\]\.pairs: a hidden term needs"):
    pairs("hidden", (3, 1, 6))
  with pytest.raises(InputError, match=r"terms\[0\]\.pairs: \(0, 9\) names a layer that is not there"):
    build_terms([{"kind": "mixer_output", "pairs": ((0, 9),)}], key="terms", steps=1, depths=(3, 8))
  with pytest.raises(InputError, match=r"terms\[0\]\.pairs: \(0, 1, 2\); give"):
    build_terms([{"kind": "mixer_output", "pairs": ((0, 1, 2),)}], key="terms", steps=1, depths=(3, 8))
