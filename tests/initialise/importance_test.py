"""Importance of parts against hooks on the transformers model, in plain numpy."""

import jax
import numpy as np
import pytest
import torch
import transformers

from distill.checkpoints import hf
from distill.initialise.importance import measure_importance
from distill.models.decoder import Decoder
from distill.parallel.mesh import MeshConfig, make_mesh
from distill.types import Batch

LENGTHS = (12, 7, 12, 3, 9, 12, 12, 5)


@pytest.fixture(scope="module")
def both(llama_dir):
  """Returns our importance over two batches, and the activations that hooks recorded: name -> rows [tokens, size]."""
  tokens = np.random.default_rng(0).integers(0, 300, (len(LENGTHS), 12)).astype(np.int32)
  positions = np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape)
  segments = (positions < np.asarray(LENGTHS)[:, None]).astype(np.int32)
  mask = segments.astype(np.float32)
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  config, params = hf.load(llama_dir)
  decoder = Decoder(config)
  shardings = decoder.shardings(mesh)
  stacked = {name: jax.device_put(np.asarray(x), shardings[name]) for name, x in decoder.stack(params).items()}
  batches = [
    Batch(tokens=tokens[rows], segments=segments[rows], positions=positions[rows], loss_mask=mask[rows])
    for rows in (slice(0, 4), slice(4, 8))
  ]
  ours = measure_importance(decoder, stacked, batches=batches, mesh=mesh)

  model = transformers.AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32)
  seen = {}

  def hook(name, module, when):
    def record(module, inputs, output=None):
      seen.setdefault(name, []).append((inputs[0] if when == "in" else output)[0].numpy())

    if when == "in":
      module.register_forward_pre_hook(record)
    else:
      module.register_forward_hook(record)

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


def test_the_importance_of_heads_and_neurons_equals_what_torch_hooks_measure(both):
  ours, seen = both
  for i in range(4):
    heads = [np.linalg.norm(row.reshape(len(row), 4, -1), axis=-1) for row in seen[f"heads.{i}"]]
    np.testing.assert_allclose(ours.heads[i], over_rows(heads), rtol=1e-4)
    np.testing.assert_allclose(ours.neurons[i], over_rows(seen[f"neurons.{i}"]), rtol=1e-4)
    square = np.concatenate([np.square(row.reshape(len(row), 4, -1)).mean(axis=-1) for row in seen[f"heads.{i}"]])
    np.testing.assert_allclose(ours.power[i], square.mean(axis=0), rtol=1e-4)


def test_the_importance_of_channels_equals_what_torch_hooks_measure(both):
  ours, seen = both
  expected = sum(over_rows(rows) for name, rows in seen.items() if name.startswith("read."))
  np.testing.assert_allclose(ours.channels, expected, rtol=1e-4)
  np.testing.assert_allclose(ours.means[2], np.concatenate(seen["read.2.0"]).mean(axis=0), atol=1e-4)


def test_the_importance_of_a_layer_is_one_minus_the_cosine_of_its_input_and_output(both):
  ours, seen = both
  for i in range(4):
    x, y = (np.concatenate(seen[f"into.{j}"]) for j in (i, i + 1))
    cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    np.testing.assert_allclose(ours.layers[i], 1.0 - cosine.mean(), rtol=1e-4)


def test_each_channels_share_of_the_squared_input_of_a_norm_equals_what_torch_hooks_measure(both):
  ours, seen = both
  for name, rows in (("layers.2.mixer_norm", "into.2"), ("layers.1.mlp_norm", "into.1.mlp_norm"), ("norm", "into.4")):
    square = np.square(np.concatenate(seen[rows]))
    np.testing.assert_allclose(ours.shares[name], (square / square.sum(-1, keepdims=True)).mean(axis=0), rtol=1e-4)
