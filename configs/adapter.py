"""Trains a LoRA adapter on prompts and completions; the demonstration's adapters were made with it.

    distill train --config=configs/adapter.py:BASE,TEXT.jsonl,DATA.jsonl[,REPLAY.jsonl…] --workdir=WORKDIR

BASE is a Hugging Face directory with a tokenizer. TEXT.jsonl holds {"text"} lines like those BASE was trained on; they
are a tenth of the rows and keep BASE's language. DATA.jsonl holds {"prompt", "completion"} lines. REPLAY files hold
lines of the same form, each file read a quarter as often as DATA: they train the skills of adapters that are already
merged into BASE, so that the new adapter does not disturb these skills.
The result is WORKDIR/adapter, a PEFT directory, after a few minutes on two CPU cores for five million parameters.
"""

from ml_collections import ConfigDict


def get_config(variant: str) -> ConfigDict:
  """Returns a recipe that trains only an adapter, by cross-entropy; `variant` is BASE,TEXT,DATA[,REPLAY…]."""
  base, text, data, *replays = variant.split(",")
  weights = {text: 0.1, data: 1.0, **dict.fromkeys(replays, 0.25)}
  sources = [{"kind": "jsonl", "path": path, "weight": weight} for path, weight in weights.items()]
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
      "stages": [
        {
          "name": "adapter",
          "steps": 300,
          "terms": [{"kind": "cross_entropy"}],
          "train": ((r"adapters\..*", 1.0), (r".*", 0.0)),
          "optimizer": {"learning_rate": {"kind": "cosine", "peak": 3e-3, "end": 1e-4, "warmup": 20}},
        }
      ],
    }
  )
