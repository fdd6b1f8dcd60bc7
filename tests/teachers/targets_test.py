import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.adapters.loading import load_merged
from distill.adapters.stack import read_adapters, stack_of
from distill.checkpoints import hf_config, sharded
from distill.data.sources import open_source
from distill.data.store import build_store
from distill.data.tokenizer import load_tokenizer
from distill.demo import ROOT, SKILLS
from distill.errors import InputError
from distill.losses.chunked import chunked_divergence
from distill.losses.divergences import forward_kl
from distill.models.decoder import Decoder
from distill.parallel.mesh import MeshConfig, make_mesh
from distill.teachers.live import LiveTeacher
from distill.teachers.targets import Sampled, TopK, pack, read_targets, unpack
from distill.types import Batch, Readout

B, T, D, V, PADDED = 3, 7, 16, 97, 104


@pytest.fixture(scope="module")
def teacher():
  """Returns (hidden states, readout with softcap, bias and padding columns, log-probabilities in float64)."""
  rng = np.random.default_rng(0)
  hidden, kernel = rng.normal(size=(B, T, D)), rng.normal(size=(D, PADDED)) * 0.8
  bias = rng.normal(size=PADDED)
  logits = 9 * np.tanh((0.7 * (hidden @ kernel + bias)) / 9)[..., :V]
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  f32 = jnp.float32
  readout = Readout(kernel=jnp.asarray(kernel, f32), bias=jnp.asarray(bias, f32), softcap=9.0, scale=0.7, vocab_size=V)
  return jnp.asarray(hidden, f32), readout, log_probs


def keys(seed):
  return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(B, dtype=jnp.uint32))


def host(kind, row):
  return tuple(np.asarray(x[row]) for x in kind)


@given(st.integers(1, 20), st.integers(0, 40), st.integers(0, 2**31))
def test_unpacking_restores_packed_integers(bits, count, seed):
  values = np.random.default_rng(seed).integers(0, 2**bits, count)
  packed = pack(values, bits=bits)
  assert packed.nbytes == -(-bits * count // 8)
  np.testing.assert_array_equal(unpack(packed, bits=bits, count=count), values)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_targets_hold_the_likeliest_tokens_and_the_probability_of_all_others(teacher, temperature):
  hidden, readout, log_probs = teacher
  log_probs = log_probs / temperature
  log_probs -= np.log(np.exp(log_probs).sum(-1, keepdims=True))
  kind = TopK(size=5, temperature=temperature)
  ids, found, tail = jax.jit(lambda: kind.select(hidden, readout, keys=keys(0)))()
  order = np.argsort(-log_probs, axis=-1)[..., :5]
  np.testing.assert_array_equal(ids, order)
  expected = np.take_along_axis(log_probs, order, axis=-1)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  np.testing.assert_allclose(tail, np.log1p(-np.exp(expected).sum(-1)), rtol=1e-5, atol=1e-6)
  for row in range(B):
    target = kind.unpack(kind.pack(host((ids, found, tail), row), id_bits=7), length=T, id_bits=7)
    np.testing.assert_array_equal(target.ids, ids[row])
    np.testing.assert_array_equal(target.log_probs, np.asarray(found[row], np.float16).astype(np.float32))
    np.testing.assert_array_equal(target.tail, np.asarray(tail[row], np.float16).astype(np.float32))


def test_sampled_tokens_follow_the_teachers_probabilities_and_do_not_depend_on_the_batch(teacher):
  hidden, readout, log_probs = teacher
  kind = Sampled(size=20)
  draw = jax.jit(lambda seed: kind.select(hidden, readout, keys=keys(seed))[0])
  shares = np.zeros((B, T, V))
  for seed in range(400):
    ids = np.asarray(draw(seed))
    assert (np.diff(ids, axis=-1) >= 0).all() and ids.min() >= 0 and ids.max() < V
    counts = (ids[..., None] == np.arange(V)).sum(-2)
    # Systematic: never a whole draw away from what is expected.
    assert (np.abs(counts - 20 * np.exp(log_probs)) < 1 + 1e-3).all()
    shares += counts / 20 / 400
  np.testing.assert_allclose(shares, np.exp(log_probs), atol=0.01)
  alone = kind.select(hidden[1:2], readout, keys=keys(3)[1:2])[0]
  np.testing.assert_array_equal(alone[0], draw(3)[1])


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 30), st.integers(0, 2**31))
def test_unpacking_sampled_targets_gives_the_count_of_each_token(length, size, seed):
  ids = np.sort(np.random.default_rng(seed).zipf(1.5, (length, size)) % 50, axis=-1).astype(np.int32)
  kind = Sampled(size=size)
  target = kind.unpack(kind.pack((ids,), id_bits=6), length=length, id_bits=6)
  for row, found, log_probs, tail in zip(ids, target.ids, target.log_probs, target.tail, strict=True):
    names, counts = np.unique(row, return_counts=True)
    np.testing.assert_array_equal(found[: len(names)], names)
    np.testing.assert_allclose(np.exp(log_probs[: len(names)]), counts / size, rtol=1e-6)
    assert (found[len(names) :] == -1).all() and tail == -np.inf


def test_the_mean_gradient_of_sampled_targets_equals_that_of_the_full_distribution(teacher):
  hidden, readout, _ = teacher
  rng = np.random.default_rng(1)
  mine = jnp.asarray(rng.normal(size=(B * T, D)), jnp.float32)
  student = Readout(kernel=jnp.asarray(rng.normal(size=(D, V)), jnp.float32), vocab_size=V)
  mask, kind = jnp.ones(B * T), Sampled(size=10)

  def loss(mine, target, theirs):
    return chunked_divergence(
      forward_kl, hidden=mine, readout=student, target=target, teacher_readout=theirs, mask=mask
    )

  whole = jax.grad(loss)(mine, hidden.reshape(-1, D), readout)
  gradient, draw = jax.jit(jax.grad(loss)), jax.jit(lambda seed: kind.select(hidden, readout, keys=keys(seed)))
  mean, count = np.zeros_like(whole), 300
  for seed in range(count):
    drawn = draw(seed)
    rows = [kind.unpack(kind.pack(host(drawn, row), id_bits=7), length=T, id_bits=7) for row in range(B)]
    mean += np.asarray(gradient(mine, jax.tree.map(lambda *x: jnp.concatenate(x), *rows), None)) / count
  assert np.linalg.norm(mean - whole) < 0.02 * np.linalg.norm(whole)


def test_sampled_targets_of_50_tokens_take_at_most_40_bytes_a_position():
  # A vocabulary of 32k and about a dozen different ids in 50 draws, as language models give.
  logits = -1.9 * np.log(np.arange(1, 32_769)) + np.random.default_rng(0).normal(size=32_768)
  readout = Readout(kernel=jnp.asarray(logits[None], jnp.float32), vocab_size=32_768)
  kind = Sampled(size=50)
  (ids,) = kind.select(jnp.ones((1, 64, 1)), readout, keys=keys(0)[:1])
  unique = np.mean([len(np.unique(row)) for row in np.asarray(ids[0])])
  assert 11 < unique < 17
  assert len(kind.pack(host((ids,), 0), id_bits=15)) / 64 <= 40
  assert TopK(size=64).bytes_a_token(18) <= 330


@pytest.mark.slow
def test_50_tokens_drawn_from_the_demo_teacher_give_a_gradient_within_6_degrees_of_the_exact_one():
  """The gradient is that of the base without adapters as student, for all its parameters and 2,048 tokens."""
  base, rows = ROOT / "teacher", 16
  adapters = read_adapters(stack_of([ROOT / "adapters" / name for name in SKILLS]), config=hf_config.read_config(base))
  mesh = make_mesh(MeshConfig(data=1, fsdp=8))
  config, params = load_merged(base, adapters=adapters, mesh=mesh, dtype="float32")
  teacher, (_, mine) = LiveTeacher(decoder=Decoder(config), params=params), sharded.load(base, mesh=mesh)
  source = open_source({"kind": "jsonl", "path": str(ROOT / "text" / "book.jsonl")}, key="text")
  with tempfile.TemporaryDirectory() as directory:
    store = build_store(source, tokenizer=load_tokenizer(base), length=128, directory=directory)
    batch = Batch(**jax.tree.map(jnp.asarray, store.read(np.arange(rows))))
  signal = jax.jit(lambda: teacher.signal(params, batch=batch, dtype=jnp.float32))()

  def loss(mine, target, theirs):
    output = teacher.decoder.apply(
      mine, tokens=batch.tokens, segments=batch.segments, positions=batch.positions, dtype=jnp.float32
    )
    return chunked_divergence(
      forward_kl,
      hidden=output.hidden.reshape(rows * 128, -1),
      readout=output.readout,
      target=target,
      teacher_readout=theirs,
      mask=batch.loss_mask.reshape(-1),
    )

  def gradient(*given):
    found = jax.device_get(jax.jit(jax.grad(loss))(mine, *given))
    return np.concatenate([np.ravel(found[name]) for name in sorted(found)])

  whole = gradient(signal.hidden.reshape(rows * 128, -1), signal.readout)
  kind = Sampled(size=50)
  row_keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(0), row))(jnp.arange(rows, dtype=jnp.uint32))
  drawn = kind.select(signal.hidden, signal.readout, keys=row_keys)
  targets = [kind.unpack(kind.pack(host(drawn, row), id_bits=12), length=128, id_bits=12) for row in range(rows)]
  sampled = gradient(jax.tree.map(lambda *x: jnp.concatenate(x), *targets), None)
  angle = np.degrees(np.arccos(whole @ sampled / np.linalg.norm(whole) / np.linalg.norm(sampled)))
  assert 0.1 < angle <= 6.0


@pytest.mark.parametrize(
  ("changed", "key"),
  [
    ({"targets": "all"}, "targets"),
    ({"size": 97}, "size"),
    ({"size": 0}, "size"),
    ({"size": 2.5}, "size"),
    ({"targets": "sampled", "size": 256}, "size"),
    ({"temperature": 0}, "temperature"),
    ({"temperature": {"kind": "linear"}}, "temperature"),
  ],
)
def test_the_error_for_an_invalid_sparse_target_option_names_its_key(changed, key):
  with pytest.raises(InputError, match=rf"config\.teacher_cache\.{key}"):
    read_targets({"targets": "top_k", "size": 8, "temperature": 1.0, **changed}, where="config.teacher_cache", vocab=97)
