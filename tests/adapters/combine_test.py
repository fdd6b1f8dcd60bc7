"""Combinations of adapters against plain NumPy on whole matrices, and the merge command."""

import json

import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers

from distill.adapters.combine import as_adapter, combine, dare, low_rank, ties
from distill.adapters.edits import LowRank
from distill.adapters.peft import Adapter, write_adapter
from distill.adapters.stack import Entry, read_adapters
from distill.checkpoints import hf, hf_config
from distill.errors import InputError

WEIGHTS = (0.5, -2.0)


@pytest.fixture(scope="module")
def base(llama_dir):
  return hf.load(llama_dir)


@pytest.fixture(scope="module")
def adapters(base, adapter_dirs):
  stack = tuple(Entry(path=path, weight=weight) for path, weight in zip(adapter_dirs, WEIGHTS, strict=True))
  return read_adapters(stack, config=base[0])


@pytest.fixture(scope="module")
def changes(adapter_dirs):
  """HF module -> weighted ΔW [out, in] of each adapter that has one, from the files alone."""
  found: dict[str, list[np.ndarray]] = {}
  for path, weight in zip(adapter_dirs, WEIGHTS, strict=True):
    settings = json.loads((path / "adapter_config.json").read_text())
    root = settings["r"] ** (0.5 if settings["use_rslora"] else 1)
    tensors = safetensors.numpy.load_file(path / "adapter_model.safetensors")
    for key in tensors:
      if key.endswith("lora_A.weight"):
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        delta = tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
        found.setdefault(module, []).append(weight * settings["lora_alpha"] / root * delta)
  return found


def plain_ties(deltas, density):
  trimmed = []
  for delta in deltas:
    smallest = np.sort(np.abs(delta).ravel())[::-1][: int(density * delta.size)][-1]
    trimmed.append(np.where(np.abs(delta) >= smallest, delta, 0))
  total = np.sum(trimmed, axis=0)
  out = np.zeros_like(total)
  for index in np.ndindex(total.shape):
    agreeing = [x[index] for x in trimmed if x[index] * total[index] > 0]
    out[index] = np.mean(agreeing) if agreeing else 0
  return out


def merged(base, adapters, changes, **how):
  """(HF module, our change [out, in], the changes of each adapter)"""
  config, params = base
  _, result = combine(params, adapters=adapters, config=config, **how)
  names = {entry.theirs.removesuffix(".weight"): entry.ours for entry in hf_config.name_table(config)}
  for module, deltas in changes.items():
    yield module, (result[names[module]] - params[names[module]]).T, deltas


def test_a_sum_is_the_weighted_sum_of_whole_changes(base, adapters, changes):
  for module, change, deltas in merged(base, adapters, changes):
    np.testing.assert_allclose(change, sum(deltas), atol=2e-6, err_msg=module)


@pytest.mark.parametrize("density", [0.2, 0.7])
def test_ties_equals_its_definition(base, adapters, changes, density):
  for module, change, deltas in merged(base, adapters, changes, method="ties", density=density):
    np.testing.assert_allclose(change, plain_ties(deltas, density), atol=2e-6, err_msg=module)


def test_ties_of_nothing_kept_is_nothing():
  assert not ties([np.ones((2, 2), np.float32)], density=0.1).any()


def test_dare_keeps_its_share_rescaled_and_the_same_for_the_same_seed(base, adapters, changes):
  found = {module: change for module, change, _ in merged(base, adapters, changes, method="dare", density=0.3, seed=5)}
  again = {module: change for module, change, _ in merged(base, adapters, changes, method="dare", density=0.3, seed=5)}
  other = {module: change for module, change, _ in merged(base, adapters, changes, method="dare", density=0.3, seed=6)}
  for module, deltas in changes.items():
    np.testing.assert_array_equal(found[module], again[module])
    assert (found[module] != other[module]).any()
    possible = [
      sum(x / 0.3 for x, kept in zip(deltas, keep, strict=True) if kept) for keep in np.ndindex(*[2] * len(deltas))
    ]
    distance = np.min([np.abs(found[module] - one) for one in possible], axis=0)
    assert distance.max() < 1e-5, module
  share = np.mean([(np.abs(found[module]) > 1e-6).mean() for module, deltas in changes.items() if len(deltas) == 1])
  assert abs(share - 0.3) < 0.03


def test_dare_keeps_the_mean():
  change = np.ones((200, 200), np.float32)
  assert abs(dare([change, change], density=0.5, seed=[0]).mean() - 2) < 0.02


@pytest.mark.parametrize("how", [{}, {"method": "ties", "density": 0.4}])
def test_an_adapter_of_a_rank_is_the_truncated_svd_of_the_change(base, adapters, changes, how):
  config, params = base
  factors = as_adapter(params, adapters=adapters, config=config, rank=3, **how)
  names = {entry.theirs.removesuffix(".weight"): entry.ours for entry in hf_config.name_table(config)}
  for module, _, deltas in merged(base, adapters, changes):
    change = plain_ties(deltas, 0.4) if how else sum(deltas)
    u, s, v = np.linalg.svd(change)
    expected = (u[:, :3] * s[:3]) @ v[:3]
    got = factors[names[module]].delta.T
    assert np.linalg.norm(got - expected) <= 1e-4 * np.linalg.norm(expected), module


def test_low_rank_of_a_matrix_of_that_rank_is_the_matrix():
  rng = np.random.default_rng(0)
  matrix = (rng.normal(size=(7, 2)) @ rng.normal(size=(2, 5))).astype(np.float32)
  found = low_rank(matrix, rank=4)
  assert isinstance(found, LowRank) and found.a.shape == (7, 4)
  np.testing.assert_allclose(found.delta, matrix, atol=1e-5)


def logits(model):
  with torch.no_grad():
    return model.eval()(torch.arange(20)[None]).logits.numpy()


def load(path):
  return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def test_the_command_writes_a_model_and_an_adapter_that_give_the_logits_of_peft(
  llama_dir, adapter_dirs, tmp_path, distill
):
  model = load(llama_dir)
  for path in adapter_dirs:
    model = peft.PeftModel.from_pretrained(model, path).merge_and_unload()
  expected = logits(model)
  flags = [f"--model={llama_dir}", f"--adapters={','.join(map(str, adapter_dirs))}"]
  distill("merge", *flags, f"--out={tmp_path / 'model'}")
  distill("merge", *flags, f"--out={tmp_path / 'adapter'}", "--format=adapter")
  scale = np.abs(expected).max()
  np.testing.assert_allclose(logits(load(tmp_path / "model")), expected, atol=1e-5 * scale)
  loaded = peft.PeftModel.from_pretrained(load(llama_dir), tmp_path / "adapter")
  np.testing.assert_allclose(logits(loaded), expected, atol=1e-5 * scale)
  assert (tmp_path / "model/tokenizer.json").is_file()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_merged_model_whose_head_is_no_longer_tied_reloads_untied_and_in_its_dtype(tmp_path, distill):
  config = transformers.LlamaConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    tie_word_embeddings=True,
    eos_token_id=7,
  )
  torch.manual_seed(0)
  transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
  model = peft.get_peft_model(load(tmp_path / "base"), peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
  with torch.no_grad():
    for factor in "AB":
      getattr(model.base_model.model.model.embed_tokens, f"lora_embedding_{factor}")["default"].normal_()
  expected = logits(model)
  model.save_pretrained(tmp_path / "adapter")
  flags = [f"--model={tmp_path / 'base'}", f"--adapters={tmp_path / 'adapter'}", f"--out={tmp_path / 'out'}"]
  distill("merge", *flags)
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
  assert again.dtype == torch.bfloat16 and not again.config.tie_word_embeddings and again.config.eos_token_id == 7
  np.testing.assert_allclose(logits(again.float()), expected, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize(
  ("flags", "says"),
  [
    ([], "--adapters or --adapter_stack"),
    (["--adapters={0}", "--rank=2"], "--format=adapter"),
    (["--adapters={0}", "--format=adapter", "--combine=ties"], "--rank"),
    (["--adapters={0}", "--out={0}"], "is a directory that is read"),
    (["--adapters={0}", "--out={0}/.."], "or holds one"),
  ],
)
def test_flags_that_do_not_go_together_are_refused(llama_dir, adapter_dirs, tmp_path, distill, flags, says):
  arguments = [f"--model={llama_dir}", f"--out={tmp_path / 'out'}", *(flag.format(adapter_dirs[0]) for flag in flags)]
  assert says in distill("merge", *arguments, check=2).stderr
  assert not (tmp_path / "out").exists()


def test_what_a_rank_keeps_is_told_and_fused_kernels_share_their_factor(tmp_path, distill):
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
  flags = ["merge", f"--model={tmp_path / 'base'}", "--format=adapter", f"--adapters={paths[0]}"]
  distill(*flags, f"--out={tmp_path / 'exact'}")
  assert json.loads((tmp_path / "exact/adapter_config.json").read_text())["r"] == 3
  done = distill(*flags, f"--out={tmp_path / 'cut'}", "--rank=1")
  assert "rank 1 keeps" in done.stdout and "of 1 modules" in done.stdout
  assert json.loads((tmp_path / "cut/adapter_config.json").read_text())["r"] == 1
  flags[-1] = f"--adapters={paths[0]},{paths[1]}"
  refused = distill(*flags, f"--out={tmp_path / 'no'}", "--rank=2", check=2).stderr
  assert f"{paths[1]}: changes head.kernel by more than LoRA can" in refused


def test_a_merged_model_that_its_dtype_cannot_hold_is_not_written(tmp_path, distill):
  config = transformers.LlamaConfig(
    vocab_size=304, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
  )
  transformers.LlamaForCausalLM(config).half().save_pretrained(tmp_path / "base")
  model = peft.get_peft_model(load(tmp_path / "base"), peft.LoraConfig(r=2, lora_alpha=1e6, target_modules=["q_proj"]))
  torch.nn.init.ones_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
  model.save_pretrained(tmp_path / "adapter")
  flags = [f"--model={tmp_path / 'base'}", f"--adapters={tmp_path / 'adapter'}", f"--out={tmp_path / 'out'}"]
  assert "float16 cannot hold" in distill("merge", *flags, check=2).stderr
  assert not (tmp_path / "out").exists()


def small_base(directory, *, tied=True):
  config = transformers.LlamaConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    tie_word_embeddings=tied,
    initializer_range=0.3,
  )
  torch.manual_seed(0)
  transformers.LlamaForCausalLM(config).save_pretrained(directory)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_a_tied_model_whose_two_tables_change_alike_stays_tied(method, tmp_path):
  small_base(tmp_path)
  config, params = hf.load(tmp_path)
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(31, 2)).astype(np.float32), rng.normal(size=(2, 16)).astype(np.float32)
  edits = (("embed.table", LowRank(a=a, b=b, scale=1.0)), ("head.kernel", LowRank(a=b.T, b=a.T, scale=1.0)))
  one = (Entry(path=tmp_path), Adapter(path=tmp_path, edits=edits))
  grown, merged = combine(params, adapters=[one], config=config, method=method, density=1.0)
  assert grown == config and set(merged) == set(params)
  np.testing.assert_allclose(merged["embed.table"], params["embed.table"] + a @ b, atol=1e-5)


def test_lora_on_an_embedding_whose_base_peft_stored_beside_it_is_written_as_lora(tmp_path):
  small_base(tmp_path / "base", tied=False)
  model = peft.get_peft_model(load(tmp_path / "base"), peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "lora_" in name:
        parameter.normal_()
  model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
  assert any(
    "base_layer" in name for name in safetensors.numpy.load_file(tmp_path / "adapter/adapter_model.safetensors")
  )
  config, params = hf.load(tmp_path / "base")
  adapters = read_adapters((Entry(path=tmp_path / "adapter"),), config=config)
  factors = as_adapter(params, adapters=adapters, config=config)
  assert set(factors) == {"embed.table", "layers.0.mixer.q.kernel"}
  write_adapter(tmp_path / "out", factors=factors, config=config)
  again = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "out")
  np.testing.assert_allclose(logits(again), logits(model), atol=1e-4)


def test_infinite_factors_are_not_written(tmp_path):
  small_base(tmp_path / "base")
  config = hf_config.read_config(tmp_path / "base")
  huge = LowRank(a=np.ones((16, 1), np.float32), b=np.full((1, 16), np.inf, np.float32), scale=1.0)
  with pytest.raises(InputError, match=r"factors of model.layers.0.self_attn.q_proj.weight become infinite"):
    write_adapter(tmp_path / "out", factors={"layers.0.mixer.q.kernel": huge}, config=config)
  assert not (tmp_path / "out").exists()
