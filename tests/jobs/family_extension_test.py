"""A model family that is defined outside the package trains, is exported, and is read back."""

import json

import jax
import numpy as np
import pytest

from distill.checkpoints import hf
from distill.checkpoints.attributes import Attributes
from distill.checkpoints.families.common import dense_table
from distill.checkpoints.family import Family
from distill.checkpoints.registry import FAMILIES
from distill.jobs.export import export
from distill.jobs.train import train
from distill.models.config import DecoderConfig, LayerConfig
from distill.models.decoder import Decoder
from distill.nn.attention import AttentionConfig
from distill.nn.mlp import MlpConfig

CONFIG = {"model_type": "toy", "dim": 16, "depth": 2, "heads": 2, "vocab": 304}


def _read(values, *, where):
  """Returns a decoder of attention layers without rope, with MLPs as wide as the model."""
  have = Attributes(values, where=where)
  width, heads = have.integer("dim"), have.integer("heads")
  mixer = AttentionConfig(num_heads=heads, num_kv_heads=heads, head_dim=width // heads, rope=None)
  layers = (LayerConfig(mixer=mixer, mlp=MlpConfig(width=width)),) * have.integer("depth")
  config = DecoderConfig(family="toy", vocab_size=have.integer("vocab"), width=width, layers=layers)
  have.finish()
  return config


def _write(config):
  mixer = config.layers[0].mixer
  return {"dim": config.width, "depth": len(config.layers), "heads": mixer.num_heads, "vocab": config.vocab_size}


@pytest.fixture
def toy(monkeypatch):
  """Registers the family for one test."""
  family = Family(name="toy", architecture="ToyForCausalLM", read=_read, write=_write, table=dense_table)
  monkeypatch.setitem(FAMILIES, "toy", family)


def test_a_model_of_a_family_defined_outside_the_package_is_trained_exported_and_read_back(
  toy, llama_dir, text_file, tmp_path
):
  recipe = {
    "teacher": {"model": str(llama_dir)},
    "student": {"config": CONFIG},
    "data": {"sources": [{"kind": "jsonl", "path": str(text_file)}], "length": 16},
    "training": {"dtype": "float32", "batch_size": 8},
    "stages": [{"name": "only", "steps": 10, "terms": [{"kind": "forward_kl"}], "optimizer": {"learning_rate": 1e-2}}],
  }
  assert train(recipe, workdir=tmp_path / "run") == 0
  losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
  assert len(losses) == 10 and losses[-1] < losses[0]

  export(tmp_path / "run/student", out=tmp_path / "exported")
  written = json.loads((tmp_path / "exported/config.json").read_text())
  assert {key: written[key] for key in CONFIG} == CONFIG
  config, params = hf.load(tmp_path / "exported")
  assert config == _read({key: CONFIG[key] for key in ("dim", "depth", "heads", "vocab")}, where="toy")
  decoder = Decoder(config)
  tokens = np.arange(8, dtype=np.int32)[None]
  output = jax.jit(decoder.apply)(decoder.stack(params), tokens=tokens, segments=np.ones_like(tokens), positions=tokens)
  assert np.isfinite(output.hidden).all()
