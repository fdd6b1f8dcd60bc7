"""Distils language models: a teacher, with its adapters, trains a student of any supported architecture.

Each command of the command line is a function of the same name here; docs/python.md shows them. A function's module is
imported when the function is first used: `import distill` alone imports no JAX and starts no device.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# By text, so that the packages below, which all import this one, form no circle with it.
_PLACES = {
  "Calibration": "distill.jobs.init",
  "InputError": "distill.errors",
  "Sampling": "distill.generation.sampling",
  "cache_teacher": "distill.jobs.cache",
  "compare": "distill.jobs.compare",
  "export": "distill.jobs.export",
  "generate": "distill.jobs.generate",
  "init": "distill.jobs.init",
  "inspect": "distill.jobs.inspect",
  "merge": "distill.jobs.merge",
  "merge_adapters": "distill.jobs.merge",
  "plan": "distill.jobs.plan",
  "score": "distill.jobs.score",
  "train": "distill.jobs.train",
}


def __getattr__(name: str) -> Any:
  """Returns a public name of the package, whose module is imported on first use."""
  if name not in _PLACES:
    raise AttributeError(f"module 'distill' has no attribute {name!r}")
  return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
  return ["__version__", *_PLACES]
