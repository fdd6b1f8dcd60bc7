"""A merged model and a combined adapter give the logits of peft; changes that they cannot hold are refused."""

import json

import numpy as np
import peft
import pytest
import torch
import transformers

from distill.errors import InputError
from distill.jobs.merge import merge, merge_adapters


def load(path):
  return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def logits(model):
  with torch.no_grad():
    return model.eval()(torch.arange(20)[None]).logits.numpy()


def tiny_llama(path, *, dtype=torch.float32, **changes):
  sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **changes))
  model.to(dtype).save_pretrained(path)
  return path


def test_the_merged_model_and_the_combined_adapter_give_the_logits_of_peft(llama_dir, adapter_dirs, tmp_path):
  model = load(llama_dir)
  for path in adapter_dirs:
    model = peft.PeftModel.from_pretrained(model, path).merge_and_unload()
  expected = logits(model)
  merge(llama_dir, adapters=adapter_dirs, out=tmp_path / "model")
  assert merge_adapters(llama_dir, adapters=adapter_dirs, out=tmp_path / "adapter") == {}
  scale = np.abs(expected).max()
  np.testing.assert_allclose(logits(load(tmp_path / "model")), expected, atol=1e-5 * scale)
  loaded = peft.PeftModel.from_pretrained(load(llama_dir), tmp_path / "adapter")
  np.testing.assert_allclose(logits(loaded), expected, atol=1e-5 * scale)
  assert (tmp_path / "model/tokenizer.json").is_file()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_head_untied_by_merging_is_written_in_the_dtype_of_the_base(tmp_path):
  base = tiny_llama(tmp_path / "base", dtype=torch.bfloat16, tie_word_embeddings=True, eos_token_id=7)
  model = peft.get_peft_model(load(base), peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
  with torch.no_grad():
    for factor in "AB":
      getattr(model.base_model.model.model.embed_tokens, f"lora_embedding_{factor}")["default"].normal_()
  expected = logits(model)
  model.save_pretrained(tmp_path / "adapter")
  merge(base, adapters=[tmp_path / "adapter"], out=tmp_path / "out")
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
  assert again.dtype == torch.bfloat16 and not again.config.tie_word_embeddings and again.config.eos_token_id == 7
  np.testing.assert_allclose(logits(again.float()), expected, atol=0.02 * np.abs(expected).max())


def test_values_that_the_dtype_of_the_base_cannot_hold_are_refused(tmp_path):
  base = tiny_llama(tmp_path / "base", dtype=torch.float16)
  model = peft.get_peft_model(load(base), peft.LoraConfig(r=2, lora_alpha=1e6, target_modules=["q_proj"]))
  torch.nn.init.ones_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
  model.save_pretrained(tmp_path / "adapter")
  with pytest.raises(InputError, match="exceed the range of the base's float16"):
    merge(base, adapters=[tmp_path / "adapter"], out=tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_merge_adapters_keeps_the_full_rank_of_an_adapter_unless_a_lower_rank_is_given(tmp_path):
  torch.manual_seed(0)
  sizes = dict(vocab_size=304, n_embd=16, n_layer=1, n_head=2, n_positions=16)
  config = transformers.GPT2Config(tie_word_embeddings=False, **sizes)
  transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
  paths = []
  for name, fields in (("a", {}), ("b", {"modules_to_save": ["lm_head"]})):
    settings = peft.LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM", **fields)
    model = peft.get_peft_model(load(tmp_path / "base"), settings)
    torch.nn.init.normal_(model.base_model.model.transformer.h[0].attn.c_attn.lora_B["default"].weight)
    model.save_pretrained(tmp_path / name)
    paths.append(tmp_path / name)

  def combined(name, adapters, rank):
    shares = merge_adapters(tmp_path / "base", adapters=adapters, out=tmp_path / name, rank=rank)
    return shares, json.loads((tmp_path / name / "adapter_config.json").read_text())["r"]

  assert combined("exact", paths[:1], rank=0) == ({}, 3)
  shares, rank = combined("cut", paths[:1], rank=1)
  (share,) = shares.values()
  assert rank == 1 and 0.5 < share < 1
  with pytest.raises(InputError, match=rf"{paths[1]}: this adapter changes head\.kernel in a way that LoRA cannot"):
    combined("no", paths, rank=2)


def test_merge_refuses_an_input_as_output_an_empty_adapter_list_zero_density_and_ties_without_rank(
  llama_dir, adapter_dirs, tmp_path
):
  for out in (adapter_dirs[0], adapter_dirs[0].parent):
    with pytest.raises(InputError, match="is or contains a directory"):
      merge(llama_dir, adapters=adapter_dirs[:1], out=out)
  with pytest.raises(InputError, match="adapters: the list is empty"):
    merge(llama_dir, adapters=[], out=tmp_path / "out")
  with pytest.raises(InputError, match="density=0"):
    merge(llama_dir, adapters=adapter_dirs, out=tmp_path / "out", method="ties", density=0.0)
  with pytest.raises(InputError, match="rank"):
    merge_adapters(llama_dir, adapters=adapter_dirs, out=tmp_path / "out", method="ties")
  assert not (tmp_path / "out").exists()
