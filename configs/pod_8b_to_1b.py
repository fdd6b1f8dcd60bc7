"""An 8B Llama teaches a 1.4B hybrid on a pod: forward KL, and four pairs of hidden states.

    distill plan --config=configs/pod_8b_to_1b.py --topology=v5p:4x4x4 --price=4.2
    distill train --config=configs/pod_8b_to_1b.py --config.teacher.model=DIRECTORY \\
      --config.data.sources="[{'kind': 'hf', 'path': 'HuggingFaceFW/fineweb-edu', …}]" --workdir=WORKDIR

Three of four layers of the student are gated delta layers, the fourth is attention. `training.batch_size` counts the
rows of all chips: one row of 4,096 tokens for each of 64. docs/pods.md has the plan of several pods.
"""

from ml_collections import ConfigDict

CHIPS = 64
TEACHER = {
  "model_type": "llama",
  "vocab_size": 128256,
  "hidden_size": 4096,
  "intermediate_size": 14336,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "num_key_value_heads": 8,
  "head_dim": 128,
  "rms_norm_eps": 1e-5,
  "rope_theta": 5e5,
  "max_position_embeddings": 131072,
  "tie_word_embeddings": False,
}
STUDENT = {
  "model_type": "qwen3_5_text",
  "vocab_size": 128256,
  "hidden_size": 2048,
  "intermediate_size": 8192,
  "num_hidden_layers": 16,
  "full_attention_interval": 4,
  "num_attention_heads": 8,
  "num_key_value_heads": 2,
  "head_dim": 256,
  "linear_num_key_heads": 16,
  "linear_num_value_heads": 16,
  "linear_key_head_dim": 128,
  "linear_value_head_dim": 128,
  "max_position_embeddings": 131072,
  "tie_word_embeddings": True,
}


def get_config() -> ConfigDict:
  """Returns the recipe."""
  return ConfigDict(
    {
      "teacher": {"model": "meta-llama/Llama-3.1-8B", "config": TEACHER, "dtype": "bfloat16"},
      "student": {"config": STUDENT},
      "data": {"sources": [{"kind": "jsonl", "path": "text.jsonl"}], "length": 4096},
      "training": {"batch_size": CHIPS, "mesh": {"data": -1, "fsdp": 16}},
      "stages": [
        {
          "name": "distill",
          "steps": 50_000,
          "terms": [
            {"kind": "forward_kl"},
            {"kind": "hidden", "weight": 0.3, "pairs": ((3, 7), (7, 15), (11, 23), (15, 31))},
          ],
          "optimizer": {
            "learning_rate": {"kind": "cosine", "peak": 3e-4, "warmup": 1000},
            "weight_decay": 0.1,
          },
        }
      ],
    }
  )
