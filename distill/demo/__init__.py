"""The embedded demonstration: a small trained teacher, three adapters, text and skill tests (see CARD.md)."""

import pathlib
from collections.abc import Mapping
from typing import Any

ROOT = pathlib.Path(__file__).parent
# Skills, and their share of the rows; the rest is general text.
SKILLS = {"book": 0.45, "category": 0.25, "class": 0.2}

# The quick start's student: three layers of the gated delta rule, one of attention.
HYBRID: Mapping[str, Any] = {
  "config": {
    "model_type": "qwen3_5_text",
    "vocab_size": 4096,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 3,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
  },
  "layers_from": (0, 3, 6, 10),
}


def recipe() -> dict[str, Any]:
  """Returns the keys that all recipes of the demonstration share: teacher, adapters, text, sizes and skills."""
  return {
    "seed": 0,
    "teacher": {"model": str(ROOT / "teacher"), "adapters": tuple(str(ROOT / "adapters" / s) for s in SKILLS)},
    "data": {
      "sources": [
        {"kind": "jsonl", "path": str(ROOT / "text" / "general.jsonl"), "weight": 0.1},
        *({"kind": "jsonl", "path": str(ROOT / "text" / f"{s}.jsonl"), "weight": w} for s, w in SKILLS.items()),
      ],
      "length": 128,
    },
    "training": {"batch_size": 16, "dtype": "float32", "checkpoint_every": 100},
    "evaluation": {
      "skills": tuple(str(ROOT / "tests" / f"{s}.jsonl") for s in SKILLS),
      "heldout": {"kind": "jsonl", "path": str(ROOT / "text" / "heldout.jsonl")},
    },
  }
