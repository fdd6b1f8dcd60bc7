"""Scores equal those of transformers and peft; tokens and layers that do not fit the model are refused."""

import json

import numpy as np
import peft
import pytest
import torch
import transformers

from distill.errors import InputError
from distill.jobs.score import check_writable, score, write_scores

TOKENS = np.zeros((1, 4), np.int32)


def test_scores_of_a_base_with_adapters_equal_those_of_transformers_with_peft(llama_dir, adapter_dirs, tmp_path):
  tokens = np.random.default_rng(0).integers(0, 300, (2, 33)).astype(np.int32)
  stack = tmp_path / "stack.json"
  stack.write_text(json.dumps({"adapters": [{"path": str(path)} for path in adapter_dirs]}))
  scores = score(llama_dir, tokens=tokens, adapters=stack, hidden=[2, 0])
  model = transformers.AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32)
  for directory in adapter_dirs:
    model = peft.PeftModel.from_pretrained(model, directory).merge_and_unload()
  with torch.no_grad():
    expected = model(torch.tensor(tokens), output_hidden_states=True)
  assert sorted(scores) == ["hidden_0", "hidden_2", "logits"]
  for ours, theirs in (
    ("logits", expected.logits),
    ("hidden_0", expected.hidden_states[1]),
    ("hidden_2", expected.hidden_states[3]),
  ):
    np.testing.assert_allclose(scores[ours], theirs.numpy(), atol=1e-5 * float(theirs.abs().max()))


def test_scores_are_written_to_exactly_the_given_file_name(tmp_path):
  write_scores({"logits": np.ones((1, 2, 3))}, out=tmp_path / "scores")
  assert np.load(tmp_path / "scores")["logits"].shape == (1, 2, 3)


def test_an_unwritable_output_file_is_refused():
  with pytest.raises(InputError, match="/nowhere/out.npz: cannot be written"):
    check_writable("/nowhere/out.npz")


@pytest.mark.parametrize(
  "tokens", [np.zeros(4, np.int32), np.zeros((1, 4)), np.zeros((1, 4), np.int64), np.zeros((0, 4), "i4")]
)
def test_score_refuses_tokens_that_are_not_a_nonempty_int32_array_of_two_axes(llama_dir, tmp_path, tokens):
  np.save(tmp_path / "other.npy", tokens)
  with pytest.raises(
    InputError, match=rf"other.npy: is an array of dtype {tokens.dtype} .*int32 array of shape \[B, T\]"
  ):
    score(llama_dir, tokens=tmp_path / "other.npy")


def test_a_token_file_that_is_not_one_array_is_refused(llama_dir, tmp_path):
  (tmp_path / "text.npy").write_text("0 1 2")
  np.savez(tmp_path / "several.npz", a=np.zeros(3))
  for name in ("text.npy", "several.npz", "gone.npy"):
    with pytest.raises(InputError, match=name):
      score(llama_dir, tokens=tmp_path / name)


@pytest.mark.parametrize("token", [-1, 304])
def test_tokens_outside_the_vocabulary_are_refused(llama_dir, token):
  with pytest.raises(InputError, match="tokens: holds token ids outside the model's vocabulary; use ids from 0 to 303"):
    score(llama_dir, tokens=TOKENS + np.int32(token))


@pytest.mark.parametrize("layer", [4, -1])
def test_hidden_layers_that_the_model_lacks_are_refused(llama_dir, layer):
  with pytest.raises(InputError, match=f"hidden={layer}: names a layer that the model lacks; use layers from 0 to 3"):
    score(llama_dir, tokens=TOKENS, hidden=[layer])
