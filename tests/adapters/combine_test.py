"""Combinations of adapters against plain NumPy on whole matrices."""

import json

import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers

from distill.adapters.combine import as_adapter, combine, dare, low_rank, ties
from distill.adapters.edits import LowRank
from distill.adapters.peft import Adapter
from distill.adapters.peft_writer import write_adapter
from distill.adapters.stack import StackEntry, read_adapters
from distill.checkpoints import hf, hf_config
from distill.errors import InputError

WEIGHTS = (0.5, -2.0)


@pytest.fixture(scope="module")
def base(llama_dir):
  return hf.load(llama_dir)


@pytest.fixture(scope="module")
def adapters(base, adapter_dirs):
  stack = tuple(StackEntry(path=path, weight=weight) for path, weight in zip(adapter_dirs, WEIGHTS, strict=True))
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


def test_combining_by_sum_gives_the_weighted_sum_of_the_adapters_changes(base, adapters, changes):
  for module, change, deltas in merged(base, adapters, changes):
    np.testing.assert_allclose(change, sum(deltas), atol=2e-6, err_msg=module)


@pytest.mark.parametrize("density", [0.2, 0.7])
def test_ties_equals_a_plain_numpy_implementation(base, adapters, changes, density):
  for module, change, deltas in merged(base, adapters, changes, method="ties", density=density):
    np.testing.assert_allclose(change, plain_ties(deltas, density), atol=2e-6, err_msg=module)


def test_ties_changes_nothing_if_the_density_retains_no_element():
  assert not ties([np.ones((2, 2), np.float32)], density=0.1).any()


def test_dare_rescales_retained_elements_and_repeats_with_the_same_seed(base, adapters, changes):
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


def test_dare_preserves_the_mean_of_the_summed_changes():
  change = np.ones((200, 200), np.float32)
  assert abs(dare([change, change], density=0.5, seed=[0]).mean() - 2) < 0.02


@pytest.mark.parametrize("how", [{}, {"method": "ties", "density": 0.4}])
def test_as_adapter_with_a_rank_gives_the_truncated_svd_of_the_change(base, adapters, changes, how):
  config, params = base
  factors = as_adapter(params, adapters=adapters, config=config, rank=3, **how)
  names = {entry.theirs.removesuffix(".weight"): entry.ours for entry in hf_config.name_table(config)}
  for module, _, deltas in merged(base, adapters, changes):
    change = plain_ties(deltas, 0.4) if how else sum(deltas)
    u, s, v = np.linalg.svd(change)
    expected = (u[:, :3] * s[:3]) @ v[:3]
    got = factors[names[module]].delta.T
    assert np.linalg.norm(got - expected) <= 1e-4 * np.linalg.norm(expected), module


def test_low_rank_reproduces_a_matrix_of_at_most_the_requested_rank():
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
def test_a_tied_model_stays_tied_if_embedding_and_head_change_alike(method, tmp_path):
  small_base(tmp_path)
  config, params = hf.load(tmp_path)
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(31, 2)).astype(np.float32), rng.normal(size=(2, 16)).astype(np.float32)
  edits = (("embed.table", LowRank(a=a, b=b, scale=1.0)), ("head.kernel", LowRank(a=b.T, b=a.T, scale=1.0)))
  one = (StackEntry(path=tmp_path), Adapter(path=tmp_path, edits=edits))
  grown, merged = combine(params, adapters=[one], config=config, method=method, density=1.0)
  assert grown == config and set(merged) == set(params)
  np.testing.assert_allclose(merged["embed.table"], params["embed.table"] + a @ b, atol=1e-5)


def test_lora_on_an_embedding_is_written_as_lora_even_if_peft_also_stored_the_whole_embedding(tmp_path):
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
  adapters = read_adapters((StackEntry(path=tmp_path / "adapter"),), config=config)
  factors = as_adapter(params, adapters=adapters, config=config)
  assert set(factors) == {"embed.table", "layers.0.mixer.q.kernel"}
  write_adapter(tmp_path / "out", factors=factors, config=config)
  again = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "out")
  np.testing.assert_allclose(logits(again), logits(model), atol=1e-4)


def test_writing_an_adapter_with_infinite_factors_is_refused(tmp_path):
  small_base(tmp_path / "base")
  config = hf_config.read_config(tmp_path / "base")
  huge = LowRank(a=np.ones((16, 1), np.float32), b=np.full((1, 16), np.inf, np.float32), scale=1.0)
  with pytest.raises(InputError, match=r"factors of model.layers.0.self_attn.q_proj.weight become infinite"):
    write_adapter(tmp_path / "out", factors={"layers.0.mixer.q.kernel": huge}, config=config)
  assert not (tmp_path / "out").exists()
