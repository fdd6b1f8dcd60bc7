"""FLOPs of the models themselves, against figures worked out by hand."""

from distill.checkpoints import hf_config
from distill.models.decoder import Decoder
from distill.planning.model_flops import forward_flops

LLAMA = {
  "model_type": "llama",
  "vocab_size": 1000,
  "hidden_size": 64,
  "intermediate_size": 160,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 16,
}
LAYER = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 160
ATTENTION = 4 * (128 / 2) * 64


def flops(config, length=128):
  return forward_flops(Decoder(hf_config.config_from_dict(config, where="config.json")), length=length)


def test_a_dense_model_needs_two_flops_a_matrix_parameter_and_half_of_the_attention_square():
  assert flops(LLAMA) == 2 * (3 * LAYER + 1000 * 64) + 3 * ATTENTION


def test_a_tied_head_counts_once_and_an_embedding_that_is_only_looked_up_does_not_count():
  assert flops({**LLAMA, "tie_word_embeddings": True}) == flops({**LLAMA, "tie_word_embeddings": False})


def test_of_the_experts_of_a_mixture_only_the_chosen_ones_count():
  moe = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 160,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
  }
  expected = 2 * (3 * (LAYER + 3 * 64 * 160 + 64 * 8) + 1000 * 64) + 3 * ATTENTION
  assert flops(moe) == expected


def test_a_recurrence_costs_the_same_at_every_length_and_attention_does_not():
  hybrid = {
    **LLAMA,
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
  }
  assert flops(hybrid, length=64) == flops(hybrid, length=4096)
  assert flops(LLAMA, length=4096) > flops(LLAMA, length=64)
