"""A family that is defined outside the package."""

import json

import numpy as np
import pytest

from distill.checkpoints import hf, hf_config
from distill.checkpoints.attributes import Attributes
from distill.checkpoints.families import common
from distill.checkpoints.family import Family
from distill.checkpoints.registry import FAMILIES
from distill.errors import InputError
from distill.models.config import AttentionConfig, LayerConfig, MlpConfig

CONFIG = {
  "model_type": "toy",
  "vocab_size": 8,
  "hidden_size": 4,
  "intermediate_size": 6,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
}


def read(values, *, where):
  have = Attributes(values, where=where)
  mixer = AttentionConfig(**common.heads(have), rope=None)
  layer = LayerConfig(mixer=mixer, mlp=MlpConfig(width=have.integer("intermediate_size"), act=have.activation()))
  return common.decoder(have, family="toy", layers=[layer] * have.integer("num_hidden_layers"))


TOY = Family(
  name="toy",
  architecture="ToyForCausalLM",
  read=read,
  write=common.written,
  table=common.dense_table,
  ignored_tensors="x",
)


def test_a_model_of_a_family_registered_from_outside_is_saved_and_loaded(tmp_path, monkeypatch):
  with pytest.raises(InputError, match="model_type 'toy' is not supported; expected one of llama, "):
    hf_config.config_from_dict(CONFIG, where="here")
  monkeypatch.setitem(FAMILIES, TOY.name, TOY)
  config = hf_config.config_from_dict(CONFIG, where="here")
  rng = np.random.default_rng(0)
  params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in hf_config.shapes(config).items()}

  hf.save(tmp_path / "model", config=config, params=params)
  loaded, found = hf.load(tmp_path / "model")

  assert loaded == config and set(found) == set(params)
  assert all(np.array_equal(found[name], value) for name, value in params.items())
  written = json.loads((tmp_path / "model/config.json").read_text())
  assert (written["architectures"], written["model_type"]) == (["ToyForCausalLM"], "toy")
  assert hf_config.who_loads(config).startswith("distill alone loads it")


def test_every_family_is_registered_under_the_name_that_its_configurations_have():
  assert {name: family.name for name, family in FAMILIES.items()} == {name: name for name in FAMILIES}
