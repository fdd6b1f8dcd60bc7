import numpy as np
import peft
import torch
import transformers

from distill.adapters.layout import layout
from distill.adapters.peft import read_adapter
from distill.checkpoints import hf_config


def test_peft_stores_mixtrals_router_under_the_module_name_of_transformers(tmp_path):
  config = transformers.MixtralConfig(
    vocab_size=23,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_local_experts=4,
  )
  model = transformers.MixtralForCausalLM(config)
  model.save_pretrained(tmp_path / "base")
  settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gate"], task_type="CAUSAL_LM")
  model = peft.get_peft_model(model, settings)
  gate = next(x for name, x in model.named_parameters() if "gate.modules_to_save" in name)
  with torch.no_grad():
    gate.normal_()
  model.save_pretrained(tmp_path / "adapter")
  assert (
    layout(hf_config.read_config(tmp_path / "base")).theirs("layers.0.mlp.router.kernel")
    == "model.layers.0.mlp.gate.weight"
  )
  edits = dict(read_adapter(tmp_path / "adapter", config=hf_config.read_config(tmp_path / "base")).edits)
  np.testing.assert_array_equal(edits["layers.0.mlp.router.kernel"].value, gate.detach().numpy().T)
