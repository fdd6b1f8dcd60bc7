"""Writes LoRA adapters as PEFT directories, which `peft` loads."""

import collections
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from distill.adapters.edits import LowRank
from distill.adapters.layout import Layout, layout
from distill.adapters.peft import PREFIX, STEM
from distill.checkpoints import hf
from distill.errors import InputError
from distill.files import safetensors_files
from distill.files.replace import replace_directory
from distill.files.tensors import finite
from distill.models.config import DecoderConfig


def _targets(chosen: set[str], *, everything: Iterable[str]) -> list[str]:
  """Returns `target_modules` of adapter_config.json for the HF modules `chosen` among `everything`.

  The list holds the last parts of the chosen names, such as `q_proj`, if no module outside `chosen` has such a last
  part; else it holds the full names.
  """
  ends = {name.rsplit(".", 1)[-1] for name in chosen}
  exact = chosen == {name for name in everything if name.rsplit(".", 1)[-1] in ends}
  return sorted(ends if exact else chosen)


def write_adapter(
  directory: pathlib.Path, *, factors: Mapping[str, LowRank], config: DecoderConfig, base: str = ""
) -> None:
  """Writes a LoRA adapter without DoRA as a PEFT directory, which appears complete or not at all.

  Args:
    directory: The directory to write: absent, empty, or an earlier export, which is replaced.
    factors: Canonical kernel name -> factors, of any rank and scale.
    config: Configuration of the base.
    base: Path or hub name of the base, for adapter_config.json.

  Raises:
    InputError: A factor is not finite, or the directory holds other files.
  """
  known = layout(config)
  modules: dict[str, LowRank] = {}
  for theirs in dict.fromkeys(known.theirs(name) for name in factors):
    one = joined(known, theirs, factors)
    if not finite(one.a) or not finite(one.b):
      raise InputError(
        f"{directory}: the factors of {theirs} become infinite; lower the weights of the stack or lora_alpha"
      )
    modules[theirs.removesuffix(".weight")] = one
  rank = collections.Counter(one.a.shape[1] for one in modules.values()).most_common(1)[0][0]
  alphas = {module: one.scale * one.a.shape[1] for module, one in modules.items()}
  alpha = collections.Counter(alphas.values()).most_common(1)[0][0]
  tensors = {}
  for module, one in modules.items():
    a, b = (np.ascontiguousarray(np.asarray(x, np.float32).T) for x in (one.a, one.b))
    names = ("A.weight", "B.weight") if known.entries[f"{module}.weight"][0].ours.endswith(".kernel") else None
    for name, value in zip(names or ("embedding_A", "embedding_B"), (a, b), strict=True):
      tensors[f"{PREFIX}{module}.lora_{name}"] = value
  settings: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": rank,
    "lora_alpha": alpha,
    "rank_pattern": {name: one.a.shape[1] for name, one in modules.items() if one.a.shape[1] != rank},
    "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
    "lora_dropout": 0.0,
    "bias": "none",
    "inference_mode": True,
    "fan_in_fan_out": any(_stored_as_ours(known, f"{name}.weight") for name in modules),
    "target_modules": _targets(
      set(modules), everything=[name.removesuffix(".weight") for name in known.entries if name.endswith(".weight")]
    ),
  }
  with replace_directory(pathlib.Path(directory), marker="adapter_config.json", files=hf.EXPORT_FILES) as work:
    safetensors_files.write(work, tensors, stem=STEM)
    (work / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _stored_as_ours(known: Layout, theirs: str) -> bool:
  """Returns True if checkpoints store the projection `theirs` as [I, O], as those of GPT-2 do."""
  entry = known.entries[theirs][0]
  return entry.ours.endswith(".kernel") and entry.form == "copy"


def joined(known: Layout, theirs: str, factors: Mapping[str, LowRank]) -> LowRank:
  """Returns the LoRA factors of one HF tensor, which may hold several kernels (fused projections).

  Kernels with equal A share it in the result. Otherwise the A of all kernels are concatenated along the rank.

  Args:
    known: Layout of the model.
    theirs: Name of the HF tensor.
    factors: Canonical kernel name -> factors; at least one kernel of the tensor has some.
  """
  mine = {entry.ours: factors[entry.ours] for entry in known.entries[theirs] if entry.ours in factors}
  first = next(iter(mine.values()))
  if len(known.entries[theirs]) == 1:
    return first
  sides = {name: np.float32(one.scale) * one.b for name, one in mine.items()}
  if all(np.array_equal(one.a, first.a) for one in mine.values()):
    return LowRank(a=first.a, b=known.join(theirs, sides), scale=1.0)
  blocks = [known.join(theirs, {name: side}) for name, side in sides.items()]
  return LowRank(a=np.concatenate([one.a for one in mine.values()], axis=1), b=np.concatenate(blocks), scale=1.0)
