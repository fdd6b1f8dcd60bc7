"""The quick start: the embedded teacher with its three adapters becomes a hybrid student of half its size.

    distill train --config=configs/quickstart.py --workdir=WORKDIR
    distill train --config=configs/quickstart.py:control --workdir=WORKDIR    # cross-entropy alone, for comparison

The student retains 92 to 105 % of what the adapters add, the control nothing: docs/quickstart.md. README.md says how
long it takes. For models, adapters and data of your own, change the paths.
"""

from ml_collections import ConfigDict

from distill.demo import HYBRID, recipe

ALIGN_STEPS = 40
DISTILL_STEPS = 240


def get_config(variant: str = "") -> ConfigDict:
  """Returns the recipe, or with 'control' the same student, data and steps under cross-entropy alone."""
  kl = {"kind": "forward_kl", "weight": 1.0, "temperature": 1.0}
  hidden = {"kind": "hidden", "weight": 1.0, "pairs": ((0, 1), (1, 4), (2, 7), (3, 10))}
  control = [{"kind": "cross_entropy"}]
  if variant not in ("", "control"):
    raise ValueError(f"configs/quickstart.py: unknown variant {variant!r}; use none, or control")
  return ConfigDict(
    {
      **recipe(),
      "student": HYBRID,
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
    }
  )
