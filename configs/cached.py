"""The quick start's student learns from a teacher cache, by logits alone.

    distill cache --config=configs/cached.py --workdir=CACHE                                  # 4 minutes on 2 CPU cores
    distill train --config=configs/cached.py --workdir=WORKDIR --config.teacher.cache=CACHE   # 3 minutes
    distill train --config=configs/cached.py --workdir=WORKDIR                                # with the live teacher
    distill train --config=configs/cached.py:control --workdir=WORKDIR                        # cross-entropy alone

The student retains as much of the skills from the cache as from the live teacher: docs/teacher_cache.md.
"""

from ml_collections import ConfigDict

from distill.demo import HYBRID, recipe

STEPS = 280


def get_config(variant: str = "") -> ConfigDict:
  """Returns the recipe; variant 'control' trains the same student on the same data by cross-entropy alone."""
  if variant not in ("", "control"):
    raise ValueError(f"configs/cached.py: unknown variant {variant!r}; leave it out, or use control")
  return ConfigDict(
    {
      **recipe(),
      "student": HYBRID,
      "teacher_cache": {"targets": "top_k", "size": 64},
      "stages": [
        {
          "name": "distill",
          "steps": STEPS,
          "terms": [{"kind": "cross_entropy" if variant else "forward_kl"}],
          "optimizer": {
            "learning_rate": {"kind": "cosine", "peak": 2e-3, "end": 5e-5, "warmup": 20},
            "weight_decay": 0.05,
            "decays": ((r".*kernel", 1.0), (r".*", 0.0)),
          },
        },
      ],
    }
  )
