"""Importances against hooks on transformers' model, in plain numpy."""

import jax
import numpy as np
import pytest
import torch
import transformers

from distill.checkpoints import hf
from distill.initialise.importance import measure
from distill.initialise.pruning import Heads, choose_heads, most_important, norm_correction, pick
from distill.models.decoder import Decoder
from distill.parallel.mesh import make_mesh
from distill.types import Batch

LENGTHS = (12, 7, 12, 3, 9, 12, 12, 5)


@pytest.fixture(scope="module")
def both(llama_dir):
  """Ours, measured over two batches on all devices, and what hooks saw: by name, arrays [rows][tokens, size]."""
  tokens = np.random.default_rng(0).integers(0, 300, (len(LENGTHS), 12)).astype(np.int32)
  positions = np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape)
  segments = (positions < np.asarray(LENGTHS)[:, None]).astype(np.int32)
  mask = segments.astype(np.float32)
  mesh = make_mesh((2, 2, 2))
  config, params = hf.load(llama_dir)
  decoder = Decoder(config)
  shardings = decoder.shardings(mesh)
  stacked = {name: jax.device_put(np.asarray(x), shardings[name]) for name, x in decoder.stack(params).items()}
  batches = [
    Batch(tokens=tokens[rows], segments=segments[rows], positions=positions[rows], loss_mask=mask[rows])
    for rows in (slice(0, 4), slice(4, 8))
  ]
  ours = measure(decoder, stacked, batches=batches, mesh=mesh)

  model = transformers.AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32)
  seen = {}

  def hook(name, module, when):
    def keep(module, inputs, output=None):
      seen.setdefault(name, []).append((inputs[0] if when == "in" else output)[0].numpy())

    if when == "in":
      module.register_forward_pre_hook(keep)
    else:
      module.register_forward_hook(keep)

  for i, layer in enumerate(model.model.layers):
    hook(f"heads.{i}", layer.self_attn.o_proj, "in")
    hook(f"neurons.{i}", layer.mlp.down_proj, "in")
    hook(f"read.{i}.0", layer.input_layernorm, "out")
    hook(f"read.{i}.1", layer.post_attention_layernorm, "out")
    hook(f"into.{i}.mlp_norm", layer.post_attention_layernorm, "in")
    hook(f"into.{i}", layer, "in")
  hook("read.last", model.model.norm, "out")
  hook("into.4", model.model.norm, "in")
  with torch.no_grad():
    for row, length in zip(tokens, LENGTHS, strict=True):
      model(torch.tensor(row[None, :length]).long())
  return ours, seen


def over_rows(rows):
  return np.sqrt(sum(np.square(np.abs(row).mean(axis=0)) for row in rows))


def test_heads_and_neurons(both):
  ours, seen = both
  for i in range(4):
    heads = [np.linalg.norm(row.reshape(len(row), 4, -1), axis=-1) for row in seen[f"heads.{i}"]]
    np.testing.assert_allclose(ours.heads[i], over_rows(heads), rtol=1e-4)
    np.testing.assert_allclose(ours.neurons[i], over_rows(seen[f"neurons.{i}"]), rtol=1e-4)
    square = np.concatenate([np.square(row.reshape(len(row), 4, -1)).mean(axis=-1) for row in seen[f"heads.{i}"]])
    np.testing.assert_allclose(ours.power[i], square.mean(axis=0), rtol=1e-4)


def test_channels(both):
  ours, seen = both
  expected = sum(over_rows(rows) for name, rows in seen.items() if name.startswith("read."))
  np.testing.assert_allclose(ours.channels, expected, rtol=1e-4)
  np.testing.assert_allclose(ours.means[2], np.concatenate(seen["read.2.0"]).mean(axis=0), atol=1e-4)


def test_layers(both):
  ours, seen = both
  for i in range(4):
    x, y = (np.concatenate(seen[f"into.{j}"]) for j in (i, i + 1))
    cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    np.testing.assert_allclose(ours.layers[i], 1.0 - cosine.mean(), rtol=1e-4)


def test_shares(both):
  ours, seen = both
  for name, rows in (("layers.2.mixer_norm", "into.2"), ("layers.1.mlp_norm", "into.1.mlp_norm"), ("norm", "into.4")):
    square = np.square(np.concatenate(seen[rows]))
    np.testing.assert_allclose(ours.shares[name], (square / square.sum(-1, keepdims=True)).mean(axis=0), rtol=1e-4)


def test_the_most_important_keep_their_order_and_the_first_of_equals_stays():
  np.testing.assert_array_equal(most_important(np.asarray([3.0, 1.0, 9.0, 3.0]), 2), [0, 2])
  np.testing.assert_array_equal(most_important(np.zeros(4), 3), [0, 1, 2])


SCORES = np.asarray([1.0, 5.0, 2.0, 3.0, 4.0, 9.0])


@pytest.mark.parametrize(
  "keys, retained, retained_keys, expected",
  [
    (3, 6, 3, Heads((0, 1, 2, 3, 4, 5), ((0,), (1,), (2,)))),
    (3, 3, 3, Heads((1, 3, 5), ((0,), (1,), (2,)))),
    (3, 2, 2, Heads((1, 5), ((0,), (2,)))),
    (3, 4, 2, Heads((0, 1, 4, 5), ((0,), (2,)))),
    (3, 4, 4, Heads((1, 3, 4, 5), ((0,), (1,), (2,), (2,)))),
    (2, 4, 2, Heads((1, 2, 4, 5), ((0,), (1,)))),
    (6, 4, 2, Heads((1, 3, 4, 5), ((1, 3), (4, 5)))),
    (6, 6, 1, Heads((0, 1, 2, 3, 4, 5), ((0, 1, 2, 3, 4, 5),))),
    (2, 8, 2, None),
    (3, 9, 3, None),
    (6, 7, 7, None),
  ],
)
def test_heads_stay_with_their_keys(keys, retained, retained_keys, expected):
  assert choose_heads(SCORES, keys=keys, retained=retained, retained_keys=retained_keys) == expected


def test_parts_are_picked_along_any_axis_and_averaged():
  value = np.arange(24.0).reshape(2, 12)
  np.testing.assert_array_equal(pick(value, [2, 0], axis=1, units=4), value[:, [6, 7, 8, 0, 1, 2]])
  np.testing.assert_array_equal(pick(value.T, [(0, 1)], axis=0, units=4), (value.T[:3] + value.T[3:6]) / 2)


def test_a_norm_of_fewer_inputs_is_corrected_by_what_they_hold():
  assert norm_correction(np.asarray([0.5, 0.5, 0.0, 0.0]), [0, 1]) == pytest.approx(np.sqrt(2.0))
  assert norm_correction(np.full(4, 0.25), [1, 3]) == pytest.approx(1.0)
