"""The quick start: the embedded teacher with its three adapters becomes a hybrid student of half its size.

    distill train --config=configs/quickstart.py --workdir=WORKDIR
    distill train --config=configs/quickstart.py:control --workdir=WORKDIR    # cross-entropy alone, for comparison

The student retains 92 to 105 % of what the adapters add, the control nothing: docs/quickstart.md. README.md says how
long it takes. For models, adapters and data of your own, change the paths.
"""

from ml_collections import ConfigDict

from distill.demo import ROOT

ALIGN_STEPS = 40
DISTILL_STEPS = 240
# The skills that the adapters taught the teacher. Each has an adapter, questions to train on, and held-out questions.
SKILLS = ("book", "category", "class")


def get_config(variant: str = "") -> ConfigDict:
  """Returns the recipe; variant 'control' trains the same student on the same data by cross-entropy alone."""
  kl = {"kind": "forward_kl", "weight": 1.0, "temperature": 1.0}
  hidden = {"kind": "hidden", "weight": 1.0, "pairs": ((0, 1), (1, 4), (2, 7), (3, 10))}
  control = [{"kind": "cross_entropy"}]
  if variant not in ("", "control"):
    raise ValueError(f"configs/quickstart.py: unknown variant {variant!r}; leave it out, or use control")
  return ConfigDict(
    {
      "seed": 0,
      "teacher": {"model": f"{ROOT}/teacher", "adapters": tuple(f"{ROOT}/adapters/{skill}" for skill in SKILLS)},
      # Three layers of the gated delta rule, then one of attention, as `qwen3_5_text` orders them.
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
          {"kind": "jsonl", "path": f"{ROOT}/text/general.jsonl", "weight": 0.1},
          {"kind": "jsonl", "path": f"{ROOT}/text/book.jsonl", "weight": 0.45},
          {"kind": "jsonl", "path": f"{ROOT}/text/category.jsonl", "weight": 0.25},
          {"kind": "jsonl", "path": f"{ROOT}/text/class.jsonl", "weight": 0.2},
        ],
        "length": 128,
      },
      "training": {"batch_size": 16, "dtype": "float32", "checkpoint_every": 100},
      "stages": [
        {
          "name": "align",
          "steps": ALIGN_STEPS,
          "terms": control if variant else [hidden],
          "optimizer": {"learning_rate": {"kind": "cosine", "peak": 2e-3, "end": 1e-3, "warmup": 20}},
        },
        {
          "name": "distill",
          "steps": DISTILL_STEPS,
          "terms": control if variant else [kl, {**hidden, "weight": 0.3}],
          "optimizer": {
            "learning_rate": {"kind": "cosine", "peak": 2e-3, "end": 5e-5, "warmup": 20},
            "weight_decay": 0.05,
            "decays": ((r".*kernel", 1.0), (r".*", 0.0)),
          },
        },
      ],
      "evaluation": {
        "skills": tuple(f"{ROOT}/tests/{skill}.jsonl" for skill in SKILLS),
        "heldout": {"kind": "jsonl", "path": f"{ROOT}/text/heldout.jsonl"},
      },
    }
  )
