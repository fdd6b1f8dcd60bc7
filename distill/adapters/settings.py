"""Reads and checks PEFT's adapter_config.json, which may come from an untrusted source."""

import math
import pathlib
import re
import warnings
from collections.abc import Mapping
from typing import Any

from distill.errors import InputError
from distill.files.json_file import read_json

# Values that do not change the arithmetic of ordinary LoRA. Others are refused, with a reason if one is known.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
  "peft_type": ("LORA",),
  "bias": ("none", "all", "lora_only"),
  "layer_replication": (None, []),
  "alora_invocation_tokens": (None,),
  "use_qalora": (False, None),
  "use_bdlora": (False, None, {}),
  "kasa_config": (None, {}),
  "arrow_config": (None, {}),
  "velora_config": (None, {}),
  "monteclora_config": (None, {}),
  "target_parameters": (None, []),
}
_REASONS: Mapping[str, str] = {
  "peft_type": "only LORA is supported; merge the adapter with peft",
  "layer_replication": "the adapter repeats layers of the base; export the resulting model with peft",
  "alora_invocation_tokens": "aLoRA acts only after its invocation tokens, which merging would lose; retrain with LoRA",
  "kasa_config": "KaSA changed the base weights; merge the adapter with peft",
  "target_parameters": "LoRA on expert weights is not supported; merge the adapter with peft",
}
_FLAGS = ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying")
_PATTERNS = ("rank_pattern", "alpha_pattern")
_READ = {"r", "lora_alpha", "trainable_token_indices", "modules_to_save", "init_lora_weights", *_FLAGS, *_PATTERNS}
# Facts about training, or about which modules have A and B, which the stored tensors tell themselves.
_IGNORED = {
  "auto_mapping",
  "base_model_name_or_path",
  "corda_config",
  "eva_config",
  "exclude_modules",
  "inference_mode",
  "layers_pattern",
  "layers_to_transform",
  "loftq_config",
  "lora_dropout",
  "lora_ga_config",
  "megatron_config",
  "megatron_core",
  "peft_version",
  "qalora_group_size",
  "revision",
  "runtime_config",
  "target_modules",
  "task_type",
}
# The elements of module patterns that are safe to match.
_PIECE = re.compile(
  r"(?P<single>\\[.a-zA-Z]|\[[^\[\]\\]+\]|[\w.-])|(?P<repeat>[*+])|(?P<other>\(\?:|[()|?^$])", re.ASCII
)
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


class PeftSettings:
  """The settings in one adapter_config.json, checked when they are read.

  Attributes:
    where: Path of the file, for error messages.
    values: Key -> value, as in the file.
  """

  def __init__(self, path: pathlib.Path):
    self.where, self.values = path, read_json(path)
    self._check()

  def get(self, key: str, default: Any = None) -> Any:
    """Returns the value of a key, or the default if it is absent."""
    return self.values.get(key, default)

  def rank(self, module: str) -> int:
    """Returns the LoRA rank R of an HF module: that of the first key in `rank_pattern` that matches it, else `r`."""
    return self._pattern("rank_pattern", module, self.values["r"])

  def scale(self, module: str) -> float:
    """Returns the factor of an HF module's LoRA change: alpha / R, or alpha / sqrt(R) for rsLoRA, with R from `rank`.

    alpha is that of the first key in `alpha_pattern` that matches the module, else `lora_alpha`.
    """
    rank = self.rank(module)
    alpha = self._pattern("alpha_pattern", module, self.values["lora_alpha"])
    return alpha / (math.sqrt(rank) if self.get("use_rslora") else rank)

  def saves(self, module: str) -> bool:
    """Returns True if a module was trained and stored as a whole (`modules_to_save`), not as LoRA factors."""
    return any(module == name or module.endswith(f".{name}") for name in self.get("modules_to_save") or ())

  def tokens(self, module: str, *, count: int) -> list[int]:
    """Returns the token ids of the `count` rows in a module's `trainable_tokens_delta`.

    Raises:
      InputError: The file lists another number of ids, or an id twice.
    """
    given = self.get("trainable_token_indices")
    if isinstance(given, dict):
      given = next((ids for name, ids in given.items() if module == name or module.endswith(f".{name}")), None)
    if not isinstance(given, list) or len(given) != count or not all(_whole(x) and x >= 0 for x in given):
      raise InputError(
        f"{self.where}: trainable_token_indices = {_short(given)}; expected {count} ids of tokens, one for each stored "
        f"row of {module}"
      )
    if len(set(given)) != count:
      raise InputError(f"{self.where}: trainable_token_indices lists a token of {module} twice; list each once")
    return given

  def _pattern(self, key: str, module: str, default: Any) -> Any:
    for pattern, value in (self.get(key) or {}).items():
      if re.match(rf"(.*\.)?({pattern})$", module):
        return value
    return default

  def _check(self) -> None:
    for key in ("peft_type", "r", "lora_alpha"):
      if key not in self.values:
        raise InputError(f"{self.where}: {key} is missing; save the adapter again with peft")
    for key, value in self.values.items():
      if key in _NEUTRAL:
        if not any(value == one and type(value) is type(one) for one in _NEUTRAL[key]):
          reason = _REASONS.get(key, "this value is not supported; merge the adapter with peft, or retrain without it")
          raise InputError(f"{self.where}: {key} = {_short(value)}: {reason}")
      elif key not in _READ | _IGNORED and value not in (None, False, {}, []):
        raise InputError(
          f"{self.where}: {key} = {_short(value)} is not understood; its effect would be lost; merge the adapter with "
          "peft instead"
        )
    init = self.get("init_lora_weights")
    if not isinstance(init, str | bool | None) or init not in _INITS:
      raise InputError(
        f"{self.where}: init_lora_weights = {_short(init)} changed the base model in training; convert the adapter to "
        "plain LoRA with peft, or merge it"
      )
    for key in _FLAGS:
      if not isinstance(self.get(key), bool | None):
        raise InputError(f"{self.where}: {key} = {_short(self.get(key))}; expected true or false")
    self._check_numbers()
    saved = self.get("modules_to_save")
    if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
      raise InputError(f"{self.where}: modules_to_save = {_short(saved)}; expected a list of module names")
    if self.get("use_dora") and self.get("lora_bias"):
      raise InputError(f"{self.where}: peft does not define lora_bias with use_dora; retrain with only one of the two")

  def _check_numbers(self) -> None:
    if not _whole(self.values["r"]) or self.values["r"] < 1:
      raise InputError(f"{self.where}: r = {_short(self.values['r'])}; expected a whole number of at least 1")
    if not _number(self.values["lora_alpha"]):
      raise InputError(f"{self.where}: lora_alpha = {_short(self.values['lora_alpha'])}; expected a finite number")
    for key in _PATTERNS:
      patterns = self.get(key) or {}
      if not isinstance(patterns, dict):
        raise InputError(f"{self.where}: {key} = {_short(patterns)}; expected an object of module patterns and numbers")
      for pattern, value in patterns.items():
        if not (_whole(value) and value >= 1) if key == "rank_pattern" else not _number(value):
          expected = "a whole number of at least 1" if key == "rank_pattern" else "a finite number"
          raise InputError(f"{self.where}: {key}[{_short(pattern)}] = {_short(value)}; expected {expected}")
        if reason := _unsafe(pattern):
          raise InputError(f"{self.where}: {key}[{_short(pattern)}]: {reason}; write whole module names instead")


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f"{text[:77]}..."


def _whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31


def _number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**127


def _unsafe(pattern: str) -> str:
  """Returns why an untrusted regex must not run (it is invalid or could take exponential time); '' if it may run."""
  if len(pattern) > 10_000:
    return "the pattern is too long"
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      re.compile(pattern)
      re.compile(rf"(.*\.)?({pattern})$")
  except (re.error, RecursionError, OverflowError, MemoryError) as error:
    return f"the pattern is not a regular expression ({' '.join(str(error).split())})"
  at, repeats, choices = 0, 0, 0
  before: str | None = None
  while at < len(pattern):
    piece = _PIECE.match(pattern, at)
    # Only single characters may repeat: nested repeats take exponential time.
    if piece is None or (piece.lastgroup == "repeat" and before != "single"):
      return "the pattern is too complex"
    repeats += piece.lastgroup == "repeat"
    choices += piece[0] in ("?", "|")
    at, before = piece.end(), piece.lastgroup
  return "the pattern is too complex" if repeats > 2 or choices > 8 else ""
