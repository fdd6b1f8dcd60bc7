"""The inputs of a loss over a vocabulary, the same for every program that computes it."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def arrays(settings: Mapping[str, Any]) -> list[np.ndarray]:
  """Hidden states [M, D] and kernels [D, V] of the student, then of the teacher; logits are of order one."""
  random = np.random.default_rng(0)
  tokens, width, vocab = (settings[name] for name in ("tokens", "width", "vocab"))
  found = []
  for _ in range(2):
    found.append(random.standard_normal((tokens, width), np.float32))
    found.append(random.standard_normal((width, vocab), np.float32) * np.float32(width**-0.5))
  return found
