"""The embedded teacher with its three adapters becomes a hybrid student of half its size.

    distill train --config=configs/quickstart.py --workdir=WORKDIR
    distill train --config=configs/quickstart.py:control --workdir=WORKDIR    # cross-entropy alone, for comparison

About six minutes on two slow CPU cores. For models, adapters and data of your own, change the paths; `data.sources`
takes files, HF datasets and TFDS (see distill/data/sources.py).
"""

from ml_collections import ConfigDict

from distill.demo import ROOT

SKILLS = {"book": 0.45, "category": 0.25, "class": 0.2}  # and their share of the rows
ALIGN_STEPS = 40
DISTILL_STEPS = 240


def get_config(variant: str = "") -> ConfigDict:
  """The recipe, or with 'control' the same student, data and steps under cross-entropy alone."""
  kl = {"kind": "forward_kl", "weight": 1.0, "temperature": 1.0}
  hidden = {"kind": "hidden", "weight": 1.0, "pairs": ((0, 1), (1, 4), (2, 7), (3, 10))}
  control = [{"kind": "cross_entropy"}]
  if variant not in ("", "control"):
    raise ValueError(f"configs/quickstart.py: unknown variant {variant!r}; use none, or control")
  return ConfigDict(
    {
      "seed": 0,
      "teacher": {"model": str(ROOT / "teacher"), "adapters": tuple(str(ROOT / "adapters" / s) for s in SKILLS)},
      "student": {
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
      },
      "data": {
        "sources": [
          {"kind": "jsonl", "path": str(ROOT / "text" / "general.jsonl"), "weight": 0.1},
          *({"kind": "jsonl", "path": str(ROOT / "text" / f"{s}.jsonl"), "weight": w} for s, w in SKILLS.items()),
        ],
        "length": 128,
      },
      "training": {"batch_size": 16, "dtype": "float32", "checkpoint_every": 100},
      "stages": {
        "1_align": {
          "steps": ALIGN_STEPS,
          "terms": control if variant else [hidden],
          "optimizer": {"learning_rate": {"kind": "cosine", "peak": 2e-3, "end": 1e-3, "warmup": 20}},
        },
        "2_distill": {
          "steps": DISTILL_STEPS,
          "terms": control if variant else [kl, {**hidden, "weight": 0.3}],
          "optimizer": {
            "learning_rate": {"kind": "cosine", "peak": 2e-3, "end": 5e-5, "warmup": 20},
            "weight_decay": 0.05,
            "decays": ((r".*kernel", 1.0), (r".*", 0.0)),
          },
        },
      },
      "evaluation": {
        "skills": tuple(str(ROOT / "tests" / f"{s}.jsonl") for s in SKILLS),
        "heldout": {"kind": "jsonl", "path": str(ROOT / "text" / "heldout.jsonl")},
      },
    }
  )
