"""The configuration of a run: its keys, their defaults, and the refusal of anything else."""

import difflib
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from distill.errors import InputError

REQUIRED = object()

STAGE: Mapping[str, Any] = {
  "steps": REQUIRED,
  "terms": REQUIRED,
  # Of this stage alone; 0: as training.batch_size and data.length say.
  "batch_size": 0,
  "length": 0,
  "train": ((".*", 1.0),),
  "optimizer": {},
}

SCHEMA: Mapping[str, Any] = {
  "seed": 0,
  "tokenizer": "",
  "teacher": {"model": "", "adapters": (), "adapter_stack": "", "dtype": "float32", "cache": ""},
  # What `distill cache` keeps of the teacher.
  "cache": {"targets": "top_k", "size": 64, "temperature": 1.0, "layers": (), "mixers": ()},
  "student": {
    "model": "",
    "config": None,
    "layers_from": (),
    "calibration_rows": 64,
    "adapters": {"targets": "", "rank": 8, "alpha": 16.0},
  },
  "data": {"sources": REQUIRED, "length": 256, "store": ""},
  "training": {
    "batch_size": 8,
    "micro_batches": 1,
    "dtype": "bfloat16",
    "mesh": (-1, 1, 1),
    "checkpoint_every": 200,
    "log_every": 1,
  },
  "stages": REQUIRED,
  "evaluation": {"skills": (), "heldout": None},
}

# What a training does not depend on.
_APART = ("cache", "evaluation")
# Free-form values: another room checks their fields.
_OPEN = {"student.config", "data.sources", "evaluation.heldout"}


def resolve(config: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
  """Plain nested dictionary with every default filled in.

  Args:
    config: What a configuration file returned: a ConfigDict or a mapping. `stages` maps a stage's name to the fields
      of `STAGE`; they run in the order of their names (a ConfigDict keeps no other), so number them.

  Raises:
    InputError: A missing or unknown key; the message suggests the nearest one.
  """
  plain = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
  resolved = _fill(plain, SCHEMA, "")
  if not isinstance(resolved["stages"], Mapping) or not resolved["stages"]:
    raise InputError("config.stages: give at least one stage, as dict(name=dict(steps=…, terms=…))")
  resolved["stages"] = {
    name: _fill(stage, STAGE, f"stages.{name}.") for name, stage in sorted(resolved["stages"].items())
  }
  sources = resolved["data"]["sources"]
  if not isinstance(sources, list | tuple) or not all(isinstance(source, Mapping) for source in sources):
    raise InputError(f"config.data.sources: {sources!r}; give a list of dicts, each with a kind")
  training = resolved["training"]
  if training["dtype"] not in ("bfloat16", "float32"):
    raise InputError(f"config.training.dtype: {training['dtype']!r}; use 'bfloat16' or 'float32'")
  if resolved["teacher"]["dtype"] not in ("bfloat16", "float16", "float32"):
    raise InputError(f"config.teacher.dtype: {resolved['teacher']['dtype']!r}; use 'bfloat16', 'float16' or 'float32'")
  _check_start(resolved["student"])
  numbers = {f"training.{key}": (training[key], 1) for key in ("batch_size", "micro_batches")}
  numbers["data.length"] = (resolved["data"]["length"], 2)
  for name, stage in resolved["stages"].items():
    numbers |= {f"stages.{name}.{key}": (stage[key], least) for key, least in (("steps", 1), ("batch_size", 0))}
    numbers[f"stages.{name}.length"] = (stage["length"], 2 if stage["length"] else 0)
  for key, (value, least) in numbers.items():
    if type(value) is not int or value < least:
      raise InputError(f"config.{key}: {value!r}; use a whole number of at least {least}")
  for rows in (training["batch_size"], *(stage["batch_size"] for stage in resolved["stages"].values())):
    if rows % training["micro_batches"]:
      raise InputError(f"config.training.micro_batches: {training['micro_batches']} must divide batch_size {rows}")
  return resolved


def _check_start(student: Mapping[str, Any]) -> None:
  layers, rows = student["layers_from"], student["calibration_rows"]
  listed = isinstance(layers, list | tuple) and all(type(layer) is int for layer in layers)
  if not listed and layers != "importance":
    raise InputError(f"config.student.layers_from: {layers!r}; list the teacher's layers, or use 'importance'")
  if type(rows) is not int or rows < 1:
    raise InputError(f"config.student.calibration_rows: {rows!r}; use a whole number of at least 1")


def fingerprint(resolved: Mapping[str, Any]) -> str:
  """Digest of everything that shapes the result of a run; evaluation, logging, saving and where a cache is do not."""
  shaping = {key: value for key, value in resolved.items() if key not in _APART}
  shaping["teacher"] = {**resolved["teacher"], "cache": bool(resolved["teacher"]["cache"])}
  quiet = ("checkpoint_every", "log_every", "mesh")
  shaping["training"] = {key: value for key, value in resolved["training"].items() if key not in quiet}
  return hashlib.sha256(json.dumps(shaping, sort_keys=True, default=str).encode()).hexdigest()


def difference(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
  """First key, in alphabetical order, at which two runs' configurations differ as JSON; empty if they are the same."""
  shaping = [{key: value for key, value in one.items() if key not in _APART} for one in (earlier, now)]
  plain = [json.loads(json.dumps(one, default=str)) for one in shaping]
  return _difference(*plain, key="config")


def _difference(earlier: Any, now: Any, *, key: str) -> str:
  if isinstance(earlier, dict) and isinstance(now, dict):
    pairs = [(f"{key}.{name}", earlier.get(name), now.get(name)) for name in sorted({*earlier, *now})]
  elif isinstance(earlier, list) and isinstance(now, list) and len(earlier) == len(now):
    pairs = [(f"{key}[{i}]", *pair) for i, pair in enumerate(zip(earlier, now, strict=True))]
  else:
    return "" if earlier == now else key
  return next((found for name, *pair in pairs if (found := _difference(*pair, key=name))), "")


def _fill(given: Any, schema: Mapping[str, Any], prefix: str) -> dict[str, Any]:
  if not isinstance(given, Mapping):
    raise InputError(f"config.{prefix.rstrip('.')}: expected a dict, got {type(given).__name__}")
  for key in given:
    if key not in schema:
      near = difflib.get_close_matches(str(key), list(schema), n=1)
      hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(schema)}"
      raise InputError(f"config.{prefix}{key}: unknown key; {hint}")
  filled = {}
  for key, default in schema.items():
    value = given.get(key, default)
    if value is REQUIRED:
      raise InputError(f"config.{prefix}{key}: missing; it has no default")
    nested = isinstance(default, Mapping) and default and f"{prefix}{key}" not in _OPEN
    filled[key] = _fill(value, default, f"{prefix}{key}.") if nested else value
  return filled
