"""Unusual but legal configurations of every family: the keys of config.json as people write them.

The first case of each family is the one that runs everywhere; the others are marked slow.
"""

LENGTH = 45
_SMALL = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "max_position_embeddings": 64}
_HEADS = {**_SMALL, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
_GEMMA = {**_HEADS, "head_dim": 16, "query_pre_attn_scalar": 24}
_GPT2 = {"vocab_size": 97, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
_MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_MAMBA = {"mamba_n_heads": 6, "mamba_n_groups": 2, "mamba_d_state": 20}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _yarn(**changes):
  return {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **changes}


CASES: dict[str, dict[str, dict]] = {
  "llama": {
    "llama3 rope, biases, wide heads, tied": {
      **_HEADS,
      "head_dim": 20,
      "attention_bias": True,
      "mlp_bias": True,
      "tie_word_embeddings": True,
      "rope_theta": 5e4,
      "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
      },
    },
    "dynamic rope past its length": {
      **_HEADS,
      "max_position_embeddings": 32,
      "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "yarn with mscale, one key head": {
      **_HEADS,
      "num_key_value_heads": 1,
      "rope_parameters": _yarn(rope_theta=5e3, mscale=1.0, mscale_all_dim=0.7, beta_fast=16.0),
    },
    "linear rope, relu": {**_HEADS, "hidden_act": "relu", "rope_scaling": {"type": "linear", "factor": 2.5}},
    "longrope past its length": {
      **_HEADS,
      "rope_scaling": {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(6)],
        "long_factor": [2.0 + i for i in range(6)],
        "original_max_position_embeddings": 32,
      },
    },
  },
  "mistral": {
    "short window, wide heads": {**_HEADS, "sliding_window": 7, "head_dim": 24, "rope_theta": 1e6},
    "no window, gelu": {**_HEADS, "sliding_window": None, "hidden_act": "gelu"},
  },
  "mixtral": {
    "three of five experts, window": {**_HEADS, "num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 9},
    "one of four experts, tied": {
      **_HEADS,
      "num_local_experts": 4,
      "num_experts_per_tok": 1,
      "tie_word_embeddings": True,
      "head_dim": 16,
    },
  },
  "qwen2": {
    "windows from the second layer": {
      **_HEADS,
      "num_hidden_layers": 3,
      "use_sliding_window": True,
      "sliding_window": 8,
      "max_window_layers": 1,
    },
    "tied, yarn, layer_types": {
      **_HEADS,
      "tie_word_embeddings": True,
      "use_sliding_window": True,
      "sliding_window": 11,
      "layer_types": ["sliding_attention", "full_attention"],
      "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
      "rope_theta": 1e6,
    },
  },
  "qwen3": {
    "wide heads, biases": {**_HEADS, "head_dim": 16, "attention_bias": True},
    "windows, tied": {
      **_HEADS,
      "head_dim": 8,
      "tie_word_embeddings": True,
      "use_sliding_window": True,
      "sliding_window": 5,
      "max_window_layers": 1,
    },
  },
  "qwen3_moe": {
    "weights not renormalised, one dense layer": {**_HEADS, **_MOE, "num_hidden_layers": 3, "mlp_only_layers": [1]},
    "renormalised, sparse every second layer, window": {
      **_HEADS,
      **_MOE,
      "norm_topk_prob": True,
      "decoder_sparse_step": 2,
      "head_dim": 16,
      "use_sliding_window": True,
      "sliding_window": 10,
    },
  },
  "qwen3_5_text": {
    "three to one": {
      **_HEADS,
      "num_hidden_layers": 4,
      "head_dim": 16,
      "linear_num_key_heads": 2,
      "linear_num_value_heads": 4,
      "linear_key_head_dim": 24,
      "linear_value_head_dim": 16,
    },
    "layer_types, as many key heads as value heads, tied, biases": {
      **_HEADS,
      "num_hidden_layers": 3,
      "layer_types": ["full_attention", "linear_attention", "full_attention"],
      "head_dim": 32,
      "partial_rotary_factor": 0.5,
      "linear_num_key_heads": 3,
      "linear_num_value_heads": 3,
      "linear_key_head_dim": 16,
      "linear_value_head_dim": 16,
      "linear_conv_kernel_dim": 3,
      "tie_word_embeddings": True,
      "attention_bias": True,
    },
  },
  "gemma": {
    "one key head, old name of the activation": {
      **_HEADS,
      "num_key_value_heads": 1,
      "head_dim": 20,
      "hidden_act": "gelu",
    },
    "biases, untied": {**_HEADS, "head_dim": 16, "attention_bias": True, "tie_word_embeddings": False},
  },
  "gemma2": {
    "tight softcaps, short windows": {
      **_GEMMA,
      "sliding_window": 6,
      "attn_logit_softcapping": 3.0,
      "final_logit_softcapping": 4.0,
    },
    "no softcaps, layer_types": {
      **_GEMMA,
      "sliding_window": 9,
      "attn_logit_softcapping": None,
      "final_logit_softcapping": None,
      "layer_types": ["full_attention", "sliding_attention"],
    },
  },
  "gemma3_text": {
    "pattern of two, linear rope on full layers": {
      **_GEMMA,
      "num_hidden_layers": 4,
      "sliding_window": 6,
      "sliding_window_pattern": 2,
      "rope_theta": 5e5,
      "rope_local_base_freq": 5e3,
      "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "nested ropes, softcap, biases": {
      **_GEMMA,
      "attention_bias": True,
      "final_logit_softcapping": 5.0,
      "sliding_window": 7,
      "layer_types": ["full_attention", "sliding_attention"],
      "rope_parameters": {
        "full_attention": _yarn(rope_theta=1e5),
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e3},
      },
    },
  },
  "phi3": {
    "longrope past its length, partial rotation": {
      **_HEADS,
      **_TOKENS,
      "num_attention_heads": 3,
      "num_key_value_heads": 1,
      "partial_rotary_factor": 0.75,
      "original_max_position_embeddings": 32,
      "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.2, 1.5, 2.0, 3.0, 4.0],
        "long_factor": [2.0, 3.0, 5.0, 9.0, 12.0, 15.0],
      },
    },
    "longrope below its length, window, tied": {
      **_HEADS,
      **_TOKENS,
      "tie_word_embeddings": True,
      "sliding_window": 12,
      "original_max_position_embeddings": 48,
      "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0 + 0.2 * i for i in range(6)],
        "long_factor": [3.0] * 6,
      },
    },
    "plain rope": {**_HEADS, **_TOKENS, "rope_theta": 2e4},
  },
  "olmo2": {
    "few key heads, biases": {**_HEADS, **_TOKENS, "attention_bias": True},
    "linear rope, tied": {
      **_HEADS,
      **_TOKENS,
      "tie_word_embeddings": True,
      "rope_scaling": {"type": "linear", "factor": 3.0},
    },
  },
  "olmo3": {
    "yarn on full layers alone": {
      **_HEADS,
      **_TOKENS,
      "num_hidden_layers": 4,
      "sliding_window": 6,
      "rope_theta": 3e5,
      "rope_scaling": _yarn(attention_factor=1.2),
    },
    "layer_types": {
      **_HEADS,
      **_TOKENS,
      "sliding_window": 11,
      "layer_types": ["full_attention", "sliding_attention"],
    },
  },
  "smollm3": {
    "every second layer without rope, biases": {
      **_HEADS,
      **_TOKENS,
      "no_rope_layer_interval": 2,
      "attention_bias": True,
      "mlp_bias": True,
    },
    "layers without rope named, windows, untied": {
      **_HEADS,
      **_TOKENS,
      "num_hidden_layers": 3,
      "no_rope_layers": [0, 1, 1],
      "use_sliding_window": True,
      "sliding_window": 8,
      "tie_word_embeddings": False,
    },
  },
  "granite": {
    "four multipliers, biases": {
      **_HEADS,
      "embedding_multiplier": 7.3,
      "attention_multiplier": 0.31,
      "residual_multiplier": 0.22,
      "logits_scaling": 6.5,
      "attention_bias": True,
      "mlp_bias": True,
    },
    "tied, quick gelu": {
      **_HEADS,
      "embedding_multiplier": 12.0,
      "residual_multiplier": 0.5,
      "attention_multiplier": 0.2,
      "tie_word_embeddings": True,
      "hidden_act": "quick_gelu",
    },
  },
  "gpt2": {
    "scores scaled by layer, narrow MLP": {**_GPT2, "scale_attn_by_inverse_layer_idx": True, "n_inner": 72},
    "scores not scaled, untied, relu": {
      **_GPT2,
      "scale_attn_weights": False,
      "tie_word_embeddings": False,
      "activation_function": "relu",
    },
  },
  "gpt_oss": {
    "three of five experts, windows": {
      **_HEADS,
      "head_dim": 16,
      "num_local_experts": 5,
      "num_experts_per_tok": 3,
      "sliding_window": 7,
      "rope_scaling": _yarn(truncate=False, beta_fast=32.0, beta_slow=1.0),
      "rope_theta": 150000.0,
    },
    "low limit, no biases on attention": {
      **_HEADS,
      "head_dim": 8,
      "num_local_experts": 4,
      "num_experts_per_tok": 2,
      "sliding_window": 12,
      "swiglu_limit": 1.0,
      "attention_bias": False,
      "tie_word_embeddings": True,
      "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
  },
  "mamba2": {
    "three heads in three groups, biases, tied": {
      "vocab_size": 97,
      "hidden_size": 48,
      "num_hidden_layers": 3,
      "num_heads": 3,
      "head_dim": 32,
      "state_size": 20,
      "n_groups": 3,
      "conv_kernel": 3,
      "use_bias": True,
      "time_step_limit": [0.0, float("inf")],
      "tie_word_embeddings": True,
    },
    "steps limited, no bias on convolutions": {
      "vocab_size": 97,
      "hidden_size": 48,
      "num_hidden_layers": 2,
      "num_heads": 10,
      "head_dim": 24,
      "expand": 5,
      "state_size": 16,
      "n_groups": 2,
      "use_conv_bias": False,
      "time_step_limit": [0.3, 1.1],
      "layer_norm_epsilon": 1e-4,
    },
    "least step alone, one group": {
      "vocab_size": 97,
      "hidden_size": 48,
      "num_hidden_layers": 2,
      "num_heads": 4,
      "head_dim": 24,
      "state_size": 16,
      "n_groups": 1,
      "time_step_limit": [0.4, float("inf")],
    },
  },
  "bamba": {
    "attention in the middle of five, all biases": {
      **_HEADS,
      **_MAMBA,
      "num_hidden_layers": 5,
      "attn_layer_indices": [2],
      "mamba_proj_bias": True,
      "attention_bias": True,
      "mlp_bias": True,
    },
    "three heads of five taps, linear rope, tied": {
      **_HEADS,
      **_MAMBA,
      "num_hidden_layers": 4,
      "attn_layer_indices": [0, 3],
      "mamba_n_heads": 3,
      "mamba_d_head": 32,
      "mamba_n_groups": 1,
      "mamba_d_conv": 5,
      "mamba_conv_bias": False,
      "time_step_limit": [0.05, 1.5],
      "rope_theta": 5e4,
      "rope_scaling": {"type": "linear", "factor": 2.0},
      "tie_word_embeddings": True,
    },
    "state spaces alone": {**_HEADS, **_MAMBA, "num_hidden_layers": 3},
  },
  "granitemoehybrid": {
    "two of five experts and a shared one, rope, multipliers": {
      **_HEADS,
      **_MAMBA,
      "num_hidden_layers": 3,
      "layer_types": ["mamba", "attention", "mamba"],
      "num_local_experts": 5,
      "num_experts_per_tok": 2,
      "intermediate_size": 24,
      "shared_intermediate_size": 40,
      "position_embedding_type": "rope",
      "rope_theta": 2e4,
      "embedding_multiplier": 7.3,
      "attention_multiplier": 0.31,
      "residual_multiplier": 0.22,
      "logits_scaling": 6.5,
      "mamba_proj_bias": True,
      "attention_bias": True,
    },
    "shared MLP alone, no rope, tied": {
      **_HEADS,
      **_MAMBA,
      "num_hidden_layers": 5,
      "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention", "full_attention"],
      "num_local_experts": 0,
      "num_experts_per_tok": 0,
      "shared_intermediate_size": 72,
      "position_embedding_type": "nope",
      "mamba_n_heads": 3,
      "mamba_n_groups": 3,
      "mamba_conv_bias": False,
      "attention_multiplier": 0.2,
      "residual_multiplier": 0.5,
      "tie_word_embeddings": True,
    },
    "state spaces alone, one of four experts": {
      **_HEADS,
      **_MAMBA,
      "num_local_experts": 4,
      "num_experts_per_tok": 1,
      "intermediate_size": 32,
      "shared_intermediate_size": 24,
      "time_step_limit": [0.0, 0.8],
    },
  },
}
NAMES = [(family, name) for family, cases in CASES.items() for name in cases]
FIRST = [(family, next(iter(cases))) for family, cases in CASES.items()]
