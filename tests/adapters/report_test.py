"""Reports of `distill inspect` on adapters."""

import json
import re
import shutil

import numpy as np
import pytest
import safetensors.numpy

from distill.adapters.report import describe
from distill.errors import InputError


@pytest.fixture
def damaged(adapter_dirs, tmp_path):
  """A copy of an adapter that can be changed: edit(tensors, settings)."""
  directory = tmp_path / "adapter"
  shutil.copytree(adapter_dirs[0], directory)

  def edit(change):
    weights, config = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    tensors, settings = safetensors.numpy.load_file(weights), json.loads(config.read_text())
    change(tensors, settings)
    safetensors.numpy.save_file(tensors, weights)
    config.write_text(json.dumps(settings))
    return directory

  return edit


def test_inspect_reports_the_norm_of_each_change_alone_and_relative_to_the_base(llama_dir, adapter_dirs):
  tensors = safetensors.numpy.load_file(adapter_dirs[0] / "adapter_model.safetensors")
  module = "model.layers.2.self_attn.q_proj"
  a, b = (tensors[f"base_model.model.{module}.lora_{half}.weight"] for half in "AB")
  norm = np.linalg.norm(1.5 * b @ a)
  (line,) = [line for line in describe(adapter_dirs[0]) if module in line]
  assert f"rank 4, scale 1.5, ‖ΔW‖ {norm:.4g}" in line
  weight = safetensors.numpy.load_file(llama_dir / "model.safetensors")[f"{module}.weight"]
  lines = list(describe(adapter_dirs[0], model=llama_dir))
  (line,) = [line for line in lines if module in line]
  assert f"{100 * norm / np.linalg.norm(weight):.3g} % of ‖W‖" in line
  assert any(f"model: {llama_dir} (llama); the adapter fits" in line for line in lines)


@pytest.mark.parametrize("with_model", [False, True])
def test_inspect_marks_modules_without_change_and_modules_with_unusually_large_changes(llama_dir, damaged, with_model):
  def change(tensors, settings):
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"] *= 0
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"] *= 100

  lines = list(describe(damaged(change), model=llama_dir if with_model else None))
  marked = {re.search(r"layers\.(\d)", line)[1]: line for line in lines if "NO CHANGE" in line or "OUTLIER" in line}
  assert set(marked) == {"0", "1"}
  assert "NO CHANGE" in marked["0"] and "OUTLIER" in marked["1"]


def test_inspect_names_each_tensor_that_would_not_load_and_the_reason(llama_dir, damaged):
  def change(tensors, settings):
    tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = np.ones((4, 32), np.float32)
    tensors["base_model.model.model.layers.0.surprise"] = np.ones(3, np.float32)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = np.ones((4, 8), np.float32)

  lines = []
  with pytest.raises(InputError, match=r"does not fit .*: 3 of its tensors would not load"):
    for line in describe(damaged(change), model=llama_dir):
      lines.append(line)
  lines = [line for line in lines if "not load" in line]
  assert len(lines) == 3
  assert any("has no module model.layers.9.self_attn.q_proj" in line for line in lines)
  assert any("surprise: this is neither a weight of a llama model" in line for line in lines)
  assert any("the model's is (32, 32)" in line for line in lines)


def test_inspect_lists_wrong_token_ids_and_still_describes_the_other_tensors(llama_dir, damaged):
  def change(tensors, settings):
    tensors["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"] = np.ones((2, 32), np.float32)
    settings["trainable_token_indices"] = [1]

  lines = []
  with pytest.raises(InputError, match="1 of its tensors"):
    for line in describe(damaged(change), model=llama_dir):
      lines.append(line)
  assert any("not load" in line and "expected 2 ids of tokens" in line for line in lines)
  assert any("layers.0.self_attn.q_proj  rank 4" in line for line in lines)


def test_the_error_of_inspect_for_an_unsupported_adapter_gives_the_reason(damaged, command):
  directory = damaged(lambda tensors, settings: settings.update(peft_type="IA3"))
  out, errors = command("inspect", directory, check=2)
  assert "adapter: IA3 of rank 4" in out and "peft_type" in errors
