"""Saving model directories."""

import numpy as np
import pytest

from distill.checkpoints import hf, hf_config, hub
from distill.errors import InputError
from tests.checkpoints.families.cases import CASES

QWEN = {"model_type": "qwen3_5_text", **CASES["qwen3_5_text"]["three to one"]}


@pytest.mark.parametrize("have, lack, every", [("linear", "full", 9), ("full", "linear", 1)])
def test_a_configuration_that_cannot_be_exported_is_refused(have, lack, every):
  config = hf_config.config_from_dict({**QWEN, "full_attention_interval": every}, where="here")
  with pytest.raises(
    InputError, match=rf"^there: all layers are {have} .* full_attention_interval .* {lack}_attention"
  ):
    hf_config.check_writable(config, where="there")
  hf_config.check_writable(hf_config.config_from_dict(QWEN, where="here"), where="there")


def save(directory, **changes):
  config = hf_config.config_from_dict(
    {"model_type": "gpt2", **CASES["gpt2"]["scores not scaled, untied, relu"]}, where="here"
  )
  params = {name: np.zeros(shape, np.float32) for name, shape in hf_config.shapes(config).items()}
  hf.save(directory, config=config, params=params, **changes)


@pytest.mark.parametrize("other", ["precious.txt", "checkpoint-5/model.safetensors", "tokenizer.json/x"])
def test_only_an_earlier_export_is_replaced(tmp_path, other):
  save(tmp_path / "run", max_file_bytes=50_000)
  before = len(list((tmp_path / "run").iterdir()))
  save(tmp_path / "run")
  assert len(list((tmp_path / "run").iterdir())) == 2 < before
  path = tmp_path / "run" / other
  path.parent.mkdir(exist_ok=True)
  path.write_text("dear")
  with pytest.raises(InputError, match=f"run: holds {other.split('/')[0]}, .* name a new or empty directory$"):
    save(tmp_path / "run")
  assert path.read_text() == "dear" and [one.name for one in tmp_path.iterdir()] == ["run"]


def test_an_export_copies_generation_config(tmp_path):
  (tmp_path / "from").mkdir()
  (tmp_path / "from/generation_config.json").write_text('{"top_k": 3}')
  save(tmp_path / "run", tokenizer_from=tmp_path / "from")
  assert (tmp_path / "run/generation_config.json").read_text() == '{"top_k": 3}'
  assert "generation_config.json" in hub._FILES


def test_invalid_json_is_located_by_line_and_column(tmp_path):
  (tmp_path / "config.json").write_text('{"a": 1,\n "b" 2}')
  with pytest.raises(InputError, match="config.json: .* correct it at line 2, column 6, or fetch it again$"):
    hf_config.read_config(tmp_path)
