"""Configuration of an evaluation: the skills and the held-out text to measure."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from distill.configuration import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
  """Options of `distill compare`: the multiple-choice skills and the held-out text to measure models on."""

  skills: tuple[str, ...] = option((), help="Files of multiple-choice questions, JSON lines, one skill a file.")
  heldout: Mapping[str, Any] | None = option(
    None, help="A data source whose text nobody was trained on; None compares skills alone."
  )
