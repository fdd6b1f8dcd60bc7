"""The stages of a run read different rows, and invalid data sources are refused with their key."""

import jax
import numpy as np
import pytest

from distill.errors import InputError
from distill.jobs import data
from distill.jobs.config import resolve
from distill.parallel.mesh import make_mesh


def read(recipe, directory):
  config = resolve(recipe)
  return data.read_batches(
    config, tokenizer=data.read_tokenizer(config), tokens=directory, mesh=make_mesh(devices=jax.devices()[:1])
  )


def test_stages_of_the_same_length_read_different_rows(tmp_path, tokenizer_dir):
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
  batches = read(config, tmp_path)
  whole = read({**config, "stages": [{**stage, "steps": 9}]}, tmp_path)
  drawn = np.concatenate([batches[name][step].tokens for name in "abc" for step in range(3)])
  assert np.array_equal(drawn, np.concatenate([whole["a"][step].tokens for step in range(8)])[: len(drawn)])
  assert batches["long"][0].tokens.shape == (4, 16)


@pytest.mark.parametrize("sources", ["text.txt", ["text.txt"], [{"kind": "text", "path": "x", "weight": "two"}], ()])
def test_the_error_for_invalid_sources_names_their_key(sources, tmp_path, tokenizer_dir):
  config = {
    "tokenizer": str(tokenizer_dir),
    "data": {"sources": sources},
    "stages": [{"name": "only", "steps": 1, "terms": ({"kind": "cross_entropy"},)}],
  }
  with pytest.raises(InputError, match=r"config\.data\.sources"):
    read(config, tmp_path)


def test_text_without_a_token_to_predict_is_refused(tmp_path, tokenizer_dir):
  (tmp_path / "text.jsonl").write_text('{"text": ""}\n' * 20)
  config = {
    "tokenizer": str(tokenizer_dir),
    "data": {"sources": [{"kind": "jsonl", "path": str(tmp_path / "text.jsonl")}]},
    "stages": [{"name": "only", "steps": 1, "terms": ({"kind": "cross_entropy"},)}],
  }
  with pytest.raises(InputError, match=r"config\.data\.sources\[0\]: no document has a token to predict"):
    read(config, tmp_path)
