"""Trains a LoRA adapter on prompts and completions: how those of the demonstration were made.

    distill train --config=configs/adapter.py:BASE,DATA.jsonl --workdir=WORKDIR

BASE is a Hugging Face directory with a tokenizer; DATA.jsonl holds {"prompt", "completion"} lines. The result is
WORKDIR/adapter, a PEFT directory. A few minutes on two CPU cores for a base of five million parameters.
"""

from ml_collections import ConfigDict


def get_config(variant: str) -> ConfigDict:
  """Cross-entropy on completions; only the adapter trains."""
  base, data = variant.split(",")
  return ConfigDict(
    {
      "seed": 0,
      "tokenizer": base,
      "student": {
        "model": base,
        "adapters": {"targets": r"layers\..*\.(mixer\.[qkvo]|mlp\.(gate|up|down))\.kernel", "rank": 8, "alpha": 16.0},
      },
      "data": {"sources": [{"kind": "jsonl", "path": data}], "length": 128},
      "training": {"batch_size": 16, "dtype": "float32"},
      "stages": {
        "adapter": {
          "steps": 300,
          "terms": [{"kind": "cross_entropy"}],
          "train": ((r"adapters\..*", 1.0), (r".*", 0.0)),
          "optimizer": {"learning_rate": {"kind": "cosine", "peak": 3e-3, "end": 1e-4, "warmup": 20}},
        }
      },
    }
  )
