import json
import shutil

import numpy as np
import peft
import pytest
import torch
import transformers

from distill.adapters.edits import LowRank
from distill.adapters.merging import merge
from distill.adapters.peft import read_adapter
from distill.adapters.peft_writer import write_adapter
from distill.adapters.stack import read_stack, stack_of
from distill.checkpoints import hf, hf_config
from distill.checkpoints import name_table as mapping
from distill.errors import InputError


def merged_by_peft(llama_dir, directories):
  model = transformers.AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32)
  for directory in directories:
    model = peft.PeftModel.from_pretrained(model, directory).merge_and_unload()
  return model


def test_a_merged_stack_equals_the_model_that_peft_merges(llama_dir, adapter_dirs):
  config, params = hf.load(llama_dir)
  _, ours = merge(params, stack=stack_of(adapter_dirs), config=config)
  theirs = merged_by_peft(llama_dir, adapter_dirs).state_dict()
  for entry in hf_config.name_table(config):
    expected = mapping.to_ours(theirs[entry.theirs].numpy(), entry=entry)
    np.testing.assert_allclose(ours[entry.ours], expected, atol=1e-6, err_msg=entry.ours)


def test_peft_loads_an_adapter_that_write_adapter_wrote(llama_dir, tmp_path):
  config, params = hf.load(llama_dir)
  rng = np.random.default_rng(0)
  names = [f"layers.{i}.mixer.q.kernel" for i in range(4)] + ["layers.2.mlp.down.kernel"]
  factors = {
    name: LowRank(
      a=rng.normal(size=(params[name].shape[0], 3)).astype(np.float32),
      b=rng.normal(size=(3, params[name].shape[1])).astype(np.float32),
      scale=0.5,
    )
    for name in names
  }
  write_adapter(tmp_path / "adapter", factors=factors, config=config)
  again = read_adapter(tmp_path / "adapter", config=config)
  assert {name for name, _ in again.edits} == set(names)
  merged = merged_by_peft(llama_dir, [tmp_path / "adapter"]).state_dict()
  _, ours = merge(params, stack=stack_of([tmp_path / "adapter"]), config=config)
  for entry in hf_config.name_table(config):
    expected = mapping.to_ours(merged[entry.theirs].numpy(), entry=entry)
    np.testing.assert_allclose(ours[entry.ours], expected, atol=1e-5, err_msg=entry.ours)


def test_a_stack_file_sets_the_weight_of_an_adapter(llama_dir, adapter_dirs, tmp_path):
  config, params = hf.load(llama_dir)
  path = tmp_path / "stack.json"
  path.write_text(json.dumps({"adapters": [{"path": str(adapter_dirs[0]), "weight": 0.25, "mode": "co-active"}]}))
  name = "layers.0.mixer.q.kernel"
  pair = dict(read_adapter(adapter_dirs[0], config=config).edits)[name]
  got = merge(params, stack=read_stack(path), config=config)[1][name]
  np.testing.assert_allclose(got, params[name] + 0.25 * pair.scale * pair.a @ pair.b, atol=1e-6)


@pytest.mark.parametrize(
  ("key", "value", "says"),
  [
    ("peft_type", "IA3", "peft_type"),
    ("use_dora", True, "use_dora"),
    ("init_lora_weights", "pissa", "init_lora_weights"),
    ("r", 5, "rank 5"),
    ("surprise", 1, "surprise"),
  ],
)
def test_the_error_for_an_unsupported_or_wrong_adapter_setting_names_the_setting(
  llama_dir, adapter_dirs, tmp_path, key, value, says
):
  directory = tmp_path / "adapter"
  shutil.copytree(adapter_dirs[0], directory)
  path = directory / "adapter_config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
  with pytest.raises(InputError, match=says):
    read_adapter(directory, config=hf_config.read_config(llama_dir))
