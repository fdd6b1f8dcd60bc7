"""Creates the random inputs of a loss over a vocabulary, the same for every program that is measured."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def arrays(settings: Mapping[str, Any]) -> list[np.ndarray]:
  """Returns hidden states [M, D] and a head [D, V] of the student, then of the teacher; logits are of order one.

  Args:
    settings: M as "tokens", D as "width" and V as "vocab".
  """
  random = np.random.default_rng(0)
  tokens, width, vocab = (settings[name] for name in ("tokens", "width", "vocab"))
  found = []
  for _ in range(2):
    found.append(random.standard_normal((tokens, width), np.float32))
    found.append(random.standard_normal((width, vocab), np.float32) * np.float32(width**-0.5))
  return found
