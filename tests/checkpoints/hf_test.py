"""Saving model directories."""

import numpy as np
import pytest

from distill.checkpoints import hf, hf_config, hub
from distill.errors import InputError
from tests.checkpoints.families.cases import CASES


def save(directory, **changes):
  config = hf_config.config_from_dict(
    {"model_type": "gpt2", **CASES["gpt2"]["scores not scaled, untied, relu"]}, where="here"
  )
  params = {name: np.zeros(shape, np.float32) for name, shape in hf_config.shapes(config).items()}
  hf.save(directory, config=config, params=params, **changes)


@pytest.mark.parametrize("other", ["precious.txt", "checkpoint-5/model.safetensors", "tokenizer.json/x"])
def test_saving_replaces_an_earlier_export_but_no_directory_with_other_files(tmp_path, other):
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


def test_an_export_copies_generation_config_json(tmp_path):
  (tmp_path / "from").mkdir()
  (tmp_path / "from/generation_config.json").write_text('{"top_k": 3}')
  save(tmp_path / "run", tokenizer_from=tmp_path / "from")
  assert (tmp_path / "run/generation_config.json").read_text() == '{"top_k": 3}'
  assert "generation_config.json" in hub._FILES
