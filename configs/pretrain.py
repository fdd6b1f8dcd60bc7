"""Pretrains a small Llama on text; the base of the demonstration was made with it.

    distill train --config=configs/pretrain.py:DIR --workdir=WORKDIR

DIR holds base.jsonl and tokenizer/, as tools/make_demo/corpus.py writes them. The run takes about 25 minutes on two CPU
cores.
"""

import pathlib

from ml_collections import ConfigDict


def get_config(directory: str) -> ConfigDict:
  """Returns a recipe that trains by cross-entropy on DIR/base.jsonl; `directory` is DIR."""
  root = pathlib.Path(directory)
  steps = 1500
  return ConfigDict(
    {
      "seed": 0,
      "tokenizer": str(root / "tokenizer"),
      "student": {
        "config": {
          "model_type": "llama",
          "vocab_size": 4096,
          "hidden_size": 192,
          "intermediate_size": 512,
          "num_hidden_layers": 11,
          "num_attention_heads": 3,
          "num_key_value_heads": 3,
          "head_dim": 64,
          "rms_norm_eps": 1e-5,
          "tie_word_embeddings": True,
          "bos_token_id": 0,
          "eos_token_id": 0,
          "pad_token_id": 0,
        }
      },
      "data": {"sources": [{"kind": "jsonl", "path": str(root / "base.jsonl")}], "length": 128},
      "training": {"batch_size": 16, "dtype": "float32"},
      "stages": [
        {
          "name": "pretrain",
          "steps": steps,
          "terms": [{"kind": "cross_entropy"}],
          "optimizer": {
            "learning_rate": {"kind": "cosine", "peak": 3e-3, "end": 1e-4, "warmup": 100},
            "weight_decay": 0.1,
            "decays": ((r".*kernel", 1.0), (r".*", 0.0)),
          },
        }
      ],
    }
  )
