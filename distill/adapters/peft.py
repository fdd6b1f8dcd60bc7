"""PEFT LoRA directories, read strictly and written so that `peft` loads them."""

import dataclasses
import json
import math
import pathlib
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from distill.errors import InputError
from distill.models import hf, safetensors_files
from distill.models.config import DecoderConfig
from distill.models.values import fields, integer, number

_PREFIX = "base_model.model."
_STEM = "adapter_model"

# Values that leave plain LoRA as it is; anything else in these keys changes the arithmetic.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
  "peft_type": ("LORA",),
  "bias": ("none",),
  "use_dora": (False,),
  "fan_in_fan_out": (False,),
  "lora_bias": (False,),
  "modules_to_save": (None, []),
  "layer_replication": (None,),
  "trainable_token_indices": (None,),
  "alora_invocation_tokens": (None,),
  "use_qalora": (False,),
  "target_parameters": (None, []),
  "exclude_modules": (None, []),
}
_READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
# Facts about training or bookkeeping: the stored A and B already tell the result.
_IGNORED = set(
  [
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "target_modules",
    "lora_dropout",
    "layers_to_transform",
    "layers_pattern",
    "megatron_config",
    "megatron_core",
    "runtime_config",
    "peft_version",
    "qalora_group_size",
    "ensure_weight_tying",
    "eva_config",
    "corda_config",
    "loftq_config",
    "arrow_config",
    "monteclora_config",
  ]
)
_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factors:
  """One adapted kernel: scale * a @ b is added to it.

  Attributes:
    a: [in, r], float32.
    b: [r, out], float32.
    scale: alpha / r, or alpha / sqrt(r).
  """

  a: np.ndarray
  b: np.ndarray
  scale: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
  """A LoRA adapter: canonical kernel name -> its factors, and where it was read."""

  path: pathlib.Path
  factors: Mapping[str, Factors]


def read_adapter(directory: pathlib.Path, *, config: DecoderConfig) -> Adapter:
  """The adapter of a PEFT directory, for a model of the given architecture.

  Raises:
    InputError: Missing or damaged files, a kind of adapter other than plain LoRA, or an adapter for another model.
  """
  directory = _locate(pathlib.Path(directory))
  where = directory / "adapter_config.json"
  settings = hf.read_json(where)
  _check(settings, where=where)
  modules = {
    entry.theirs.removesuffix(".weight"): entry.ours for entry in hf.table(config) if entry.ours.endswith(".kernel")
  }
  shapes = hf.shapes(config)
  halves: dict[str, dict[str, np.ndarray]] = {}
  for key, value in safetensors_files.read(directory, stem=_STEM).items():
    found = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight", key)
    if not found or found[1] not in modules:
      raise InputError(f"{directory}: {key} is not a LoRA weight of a {config.family} model; adapter for another model")
    halves.setdefault(found[1], {})[found[2]] = value.astype(np.float32)
  if not halves:
    raise InputError(f"{directory}: no LoRA weights in {_STEM}.safetensors")
  factors = {}
  for module, pair in halves.items():
    if set(pair) != {"A", "B"}:
      raise InputError(f"{directory}: {module} has only one of lora_A and lora_B")
    name = modules[module]
    a, b = pair["A"].T, pair["B"].T
    rank = _pattern(settings, "rank_pattern", module, settings["r"])
    if a.shape[1] != rank or b.shape[0] != rank:
      raise InputError(f"{directory}: {module} has rank {a.shape[1]}, adapter_config.json says {rank}")
    if (a.shape[0], b.shape[1]) != shapes[name]:
      raise InputError(
        f"{directory}: {module} adapts a kernel of {(a.shape[0], b.shape[1])}, the model's is {shapes[name]}; "
        "adapter for another model"
      )
    alpha = _pattern(settings, "alpha_pattern", module, settings["lora_alpha"])
    factors[name] = Factors(a=a, b=b, scale=alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))
  return Adapter(path=directory, factors=factors)


def _locate(directory: pathlib.Path) -> pathlib.Path:
  """The directory itself, or the only subfolder that holds an adapter, as PEFT writes one of another name."""
  if (directory / "adapter_config.json").is_file():
    return directory
  inner = sorted(path.parent for path in directory.glob("*/adapter_config.json"))
  if len(inner) == 1:
    return inner[0]
  hint = f"name one of its adapters: {', '.join(path.name for path in inner)}" if inner else "give a PEFT directory"
  raise InputError(f"{directory}/adapter_config.json: no such file; {hint}")


def _check(settings: Mapping[str, Any], *, where: pathlib.Path) -> None:
  for key in ("peft_type", "r", "lora_alpha"):
    if key not in settings:
      raise InputError(f"{where}: {key} is missing")
  integer(settings["r"], where=f"{where}: r")
  number(settings["lora_alpha"], where=f"{where}: lora_alpha")
  for key in ("rank_pattern", "alpha_pattern"):
    for pattern, value in fields(settings.get(key) or {}, where=f"{where}: {key}").items():
      number(value, where=f"{where}: {key}.{pattern}")
      try:
        with warnings.catch_warnings():
          warnings.simplefilter("error")
          re.compile(rf"(.*\.)?({pattern})$")
      except (re.error, RecursionError, OverflowError, Warning) as error:
        raise InputError(f"{where}: {key} {pattern!r} is not a regular expression ({error})") from error
  for key, value in settings.items():
    if key in _NEUTRAL:
      if value not in _NEUTRAL[key]:
        raise InputError(
          f"{where}: {key} = {value!r} is not supported; merge the adapter with peft, or retrain without"
        )
    elif key == "init_lora_weights":
      if value not in _INITS:
        raise InputError(f"{where}: init_lora_weights = {value!r} changed the base model; merge the adapter with peft")
    elif key not in _READ | _IGNORED and value not in (None, False, {}, []):
      raise InputError(f"{where}: {key} = {value!r} is not understood; its effect would be lost")


def _pattern(settings: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
  for pattern, value in (settings.get(key) or {}).items():
    if re.match(rf"(.*\.)?({pattern})$", module):
      return value
  return default


def _targets(chosen: set[str], *, everything: Iterable[str]) -> list[str]:
  """The last parts of the module names where they mean exactly these modules, else the full names."""
  ends = {name.rsplit(".", 1)[-1] for name in chosen}
  exact = chosen == {name for name in everything if name.rsplit(".", 1)[-1] in ends}
  return sorted(ends if exact else chosen)


def write_adapter(
  directory: pathlib.Path, *, factors: Mapping[str, Factors], config: DecoderConfig, base: str = ""
) -> None:
  """Writes a PEFT directory, whole or not at all; every kernel must share one rank and scale.

  Args:
    directory: Must be absent, empty, or an earlier adapter.
    factors: Canonical kernel name -> factors.
    config: Architecture of the base.
    base: Path or hub name of the base, for the reader.
  """
  ranks, scales = {x.a.shape[1] for x in factors.values()}, {x.scale for x in factors.values()}
  assert len(ranks) == len(scales) == 1, (ranks, scales)
  rank = ranks.pop()
  modules = {entry.ours: entry.theirs.removesuffix(".weight") for entry in hf.table(config)}
  tensors = {}
  for name, pair in factors.items():
    for half, value in (("A", pair.a), ("B", pair.b)):
      key = f"{_PREFIX}{modules[name]}.lora_{half}.weight"
      tensors[key] = np.ascontiguousarray(np.asarray(value, np.float32).T)
  settings = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": rank,
    "lora_alpha": scales.pop() * rank,
    "lora_dropout": 0.0,
    "bias": "none",
    "inference_mode": True,
    "target_modules": _targets({modules[name] for name in factors}, everything=modules.values()),
  }
  with hf.replacing(directory, marker="adapter_config.json") as work:
    safetensors_files.write(work, tensors, stem=_STEM)
    (work / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
