"""Five student architectures learn from the embedded teacher, with the same text, steps and terms.

    distill train --config=configs/architectures.py:KIND --workdir=WORKDIR          # KIND is a key of STUDENTS
    distill train --config=configs/architectures.py:KIND,control --workdir=WORKDIR  # cross-entropy alone

`python -m tools.compare_architectures` runs them all in 23 minutes on two CPU cores. All five retain 90 to 105 % of
every skill: docs/architectures.md.
"""

from ml_collections import ConfigDict

from distill.demo import recipe

ALIGN_STEPS, DISTILL_STEPS = 40, 140
FEW = (0, 3, 6, 10)

_COMMON = {"vocab_size": 4096, "hidden_size": 192, "tie_word_embeddings": True}
_LAYERS = {**_COMMON, "num_hidden_layers": 4, "intermediate_size": 512, "rms_norm_eps": 1e-5}
_HEADS = {"num_attention_heads": 3, "num_key_value_heads": 3}
_SPACE = {
  "mamba_n_heads": 3,
  "mamba_d_head": 64,
  "mamba_n_groups": 3,
  "mamba_d_state": 64,
  "mamba_expand": 1,
}
# Keys of a config.json, and the teacher layer that each student layer starts from.
STUDENTS = {
  "dense": ({"model_type": "llama", **_LAYERS, **_HEADS, "head_dim": 64}, FEW),
  "moe": (
    {
      "model_type": "qwen3_moe",
      **_LAYERS,
      **_HEADS,
      "head_dim": 64,
      "num_experts": 4,
      "num_experts_per_tok": 2,
      "moe_intermediate_size": 256,
      "norm_topk_prob": True,
    },
    FEW,
  ),
  "gated_delta_hybrid": (
    {
      "model_type": "qwen3_5_text",
      **_LAYERS,
      **_HEADS,
      "head_dim": 64,
      "linear_num_key_heads": 3,
      "linear_num_value_heads": 3,
      "linear_key_head_dim": 64,
      "linear_value_head_dim": 64,
    },
    FEW,
  ),
  "mamba2_hybrid": ({"model_type": "bamba", **_LAYERS, **_HEADS, **_SPACE, "attn_layer_indices": [3]}, FEW),
  # It has no MLPs, so that it takes all eleven layers.
  "mamba2": (
    {
      "model_type": "mamba2",
      **_COMMON,
      "num_hidden_layers": 11,
      "num_heads": 3,
      "head_dim": 64,
      "n_groups": 3,
      "state_size": 64,
      "expand": 1,
      "layer_norm_epsilon": 1e-5,
    },
    tuple(range(11)),
  ),
}


def get_config(variant: str) -> ConfigDict:
  """Returns the recipe of a variant: KIND, or KIND,control to train the same student by cross-entropy alone."""
  kind, _, control = variant.partition(",")
  if kind not in STUDENTS or control not in ("", "control"):
    raise ValueError(
      f"configs/architectures.py: unknown variant {variant!r}; use one of {', '.join(STUDENTS)}, with or without "
      "',control' after it"
    )
  config, layers = STUDENTS[kind]
  kl, hidden, control_terms = {"kind": "forward_kl"}, {"kind": "hidden"}, [{"kind": "cross_entropy"}]
  return ConfigDict(
    {
      **recipe(),
      "student": {"config": config, "layers_from": layers},
      "stages": [
        {
          "name": "align",
          "steps": ALIGN_STEPS,
          "terms": control_terms if control else [hidden],
          "optimizer": {"learning_rate": {"kind": "cosine", "peak": 2e-3, "end": 1e-3, "warmup": 20}},
        },
        {
          "name": "distill",
          "steps": DISTILL_STEPS,
          "terms": control_terms if control else [kl, {**hidden, "weight": 0.3}],
          "optimizer": {
            "learning_rate": {"kind": "cosine", "peak": 2e-3, "end": 5e-5, "warmup": 20},
            "weight_decay": 0.05,
            "decays": ((r".*kernel", 1.0), (r".*", 0.0)),
          },
        },
      ],
    }
  )
