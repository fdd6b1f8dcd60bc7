"""Meshes that do not divide a published model's parameters: refused with what copies would cost."""

import pytest
from jax.sharding import AbstractMesh

from distill.checkpoints import hf_config
from distill.errors import InputError
from distill.jobs.layout import check_divides
from distill.models.decoder import Decoder

QWEN_30B = {
  "model_type": "qwen3_moe",
  "vocab_size": 151936,
  "hidden_size": 2048,
  "intermediate_size": 6144,
  "moe_intermediate_size": 768,
  "num_hidden_layers": 48,
  "num_attention_heads": 32,
  "num_key_value_heads": 4,
  "head_dim": 128,
  "num_experts": 128,
  "num_experts_per_tok": 8,
  "decoder_sparse_step": 1,
  "mlp_only_layers": [],
}
GEMMA_12B = {
  "model_type": "gemma3_text",
  "vocab_size": 262208,
  "hidden_size": 3840,
  "intermediate_size": 15360,
  "num_hidden_layers": 12,
  "num_attention_heads": 16,
  "num_key_value_heads": 8,
  "head_dim": 256,
}
LLAMA = {"model_type": "llama", "vocab_size": 300, "hidden_size": 36, "intermediate_size": 68, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 3, "num_key_value_heads": 3}


def check(config, **sizes):
  names = ("slice", "data", "fsdp", "expert", "tensor")
  mesh = AbstractMesh(tuple(sizes.get(name, 1) for name in names), names)
  decoder = Decoder(hf_config.config_from_dict(config, where="config.json"))
  check_divides(decoder, mesh=mesh, dtype="bfloat16", key="config.teacher")


@pytest.mark.parametrize(
  ("config", "fsdp", "says"),
  [
    (QWEN_30B, 48, r"config.training.mesh.fsdp: 48 divides no dimension .* Use 16 or 8"),
    (GEMMA_12B, 512, r"config.training.mesh.fsdp: 512 divides no dimension .* Use 256 or 128"),
  ],
)
def test_a_mesh_that_leaves_large_parameters_whole_is_refused_with_sizes_that_divide(config, fsdp, says):
  with pytest.raises(InputError, match=says):
    check(config, fsdp=fsdp)


@pytest.mark.parametrize(("config", "fsdp"), [(QWEN_30B, 32), (GEMMA_12B, 256), (LLAMA, 8)])
def test_a_mesh_that_divides_all_large_parameters_is_accepted(config, fsdp):
  check(config, fsdp=fsdp)
