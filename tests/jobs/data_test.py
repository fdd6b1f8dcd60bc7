import numpy as np
import pytest

from distill.errors import InputError
from distill.jobs import data
from distill.jobs.config import resolve


def test_stages_of_one_length_read_on_from_each_other(tmp_path, tokenizer_dir):
  text = tmp_path / "text.txt"
  text.write_text("\n\n".join(f"the old model teaches a new one {i} of it" for i in range(200)))
  stage = {"name": "a", "steps": 3, "terms": ({"kind": "cross_entropy"},)}
  config = {
    "tokenizer": str(tokenizer_dir),
    "data": {"sources": [{"kind": "text", "path": str(text)}], "length": 8},
    "training": {"batch_size": 4},
    "stages": [
      stage,
      {**stage, "name": "b", "batch_size": 2},
      {**stage, "name": "long", "length": 16},
      {**stage, "name": "c"},
    ],
  }
  _, batches = data.read(resolve(config), workdir=tmp_path)
  _, whole = data.read(resolve({**config, "stages": [{**stage, "steps": 9}]}), workdir=tmp_path)
  drawn = np.concatenate([batches[name][step].tokens for name in "abc" for step in range(3)])
  assert np.array_equal(drawn, np.concatenate([whole["a"][step].tokens for step in range(8)])[: len(drawn)])
  assert batches["long"][0].tokens.shape == (4, 16)


@pytest.mark.parametrize("sources", ["text.txt", ["text.txt"], [{"kind": "text", "path": "x", "weight": "two"}], ()])
def test_sources_that_are_none_are_refused_by_their_key(sources, tmp_path, tokenizer_dir):
  config = {
    "tokenizer": str(tokenizer_dir),
    "data": {"sources": sources},
    "stages": [{"name": "only", "steps": 1, "terms": ({"kind": "cross_entropy"},)}],
  }
  with pytest.raises(InputError, match=r"config\.data\.sources"):
    data.read(resolve(config), workdir=tmp_path)
