"""Trains a LoRA adapter on prompts and completions: how those of the demonstration were made.

    distill train --config=configs/adapter.py:BASE,DATA.jsonl[,REPLAY.jsonl…] --workdir=WORKDIR

BASE is a Hugging Face directory with a tokenizer; DATA.jsonl holds {"prompt", "completion"} lines, and so do the files
after it, of which a quarter as much is read each: the skills of adapters that BASE has already merged, which the new
one must not disturb. The result is WORKDIR/adapter, a PEFT directory. A few minutes on two CPU cores for a base of five
million parameters.
"""

from ml_collections import ConfigDict


def get_config(variant: str) -> ConfigDict:
  """Cross-entropy on completions; only the adapter trains."""
  base, data, *replays = variant.split(",")
  sources = [{"kind": "jsonl", "path": data}, *({"kind": "jsonl", "path": path, "weight": 0.25} for path in replays)]
  return ConfigDict(
    {
      "seed": 0,
      "tokenizer": base,
      "student": {
        "model": base,
        "adapters": {"targets": r"layers\..*\.(mixer\.[qkvo]|mlp\.(gate|up|down))\.kernel", "rank": 8, "alpha": 16.0},
      },
      "data": {"sources": sources, "length": 128},
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
