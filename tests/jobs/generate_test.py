"""Continuations equal those of transformers; empty prompts and too many tokens are refused."""

import shutil

import pytest
import torch
import transformers

from distill.errors import InputError
from distill.jobs import generate as job
from distill.jobs.generate import generate, generate_pieces


def test_generate_returns_the_continuations_of_transformers(llama_dir):
  tokenizer = transformers.AutoTokenizer.from_pretrained(llama_dir)
  model = transformers.AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32)
  prompts, expected = ["the old model", "here"], []
  for prompt in prompts:
    given = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
      ids = model.generate(
        given["input_ids"],
        attention_mask=given["attention_mask"],
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
      )[0, given["input_ids"].shape[1] :]
    expected.append(tokenizer.decode([int(i) for i in ids if int(i) != tokenizer.eos_token_id]))
  assert generate(llama_dir, prompts=prompts, max_tokens=12) == expected


def test_no_streamed_piece_ends_within_a_character(llama_dir, tokenizer_dir, monkeypatch):
  tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
  ids = tokenizer("→ on", add_special_tokens=False)["input_ids"]
  monkeypatch.setattr(job, "load_model", lambda *_, **__: (transformers.AutoConfig, {}))
  monkeypatch.setattr(job, "stream", lambda *_, **__: iter([[[one], [ids[-1]]] for one in ids]))
  monkeypatch.setattr(transformers.AutoConfig, "config", transformers.AutoConfig, raising=False)
  monkeypatch.setattr(transformers.AutoConfig, "max_positions", 100, raising=False)
  pieces = list(generate_pieces(llama_dir, prompts=["the", "old"]))
  assert "".join(first for first, _ in pieces) == "→ on"
  assert not any("\N{REPLACEMENT CHARACTER}" in first for first, _ in pieces)


@pytest.mark.parametrize("prompts", [[""], ["old", ""]])
def test_an_empty_prompt_is_refused(llama_dir, prompts):
  with pytest.raises(InputError, match="prompt: one of the prompts is empty"):
    generate(llama_dir, prompts=prompts)


def test_max_tokens_beyond_the_models_positions_is_refused(llama_dir):
  with pytest.raises(InputError, match="max_tokens=99: .*64 positions"):
    generate(llama_dir, prompts=["old"], max_tokens=99)


def test_generating_with_a_model_without_a_tokenizer_is_refused(llama_dir, tmp_path):
  model = shutil.copytree(llama_dir, tmp_path / "model")
  (model / "tokenizer_config.json").unlink()
  with pytest.raises(InputError, match="tokenizer_config.json: no such file"):
    generate(model, prompts=["old"])
