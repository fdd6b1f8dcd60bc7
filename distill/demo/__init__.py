"""The embedded demonstration: a small trained teacher, three adapters, text and tests. CARD.md tells what they are."""

import pathlib
from typing import Any

ROOT = pathlib.Path(__file__).parent
SKILLS = {"book": 0.45, "category": 0.25, "class": 0.2}  # And their share of the rows; the rest is general text.


def recipe() -> dict[str, Any]:
  """What recipes on the demonstration have in common: the teacher with its adapters, the text, sizes and tests."""
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
