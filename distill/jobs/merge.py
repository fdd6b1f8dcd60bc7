"""The merge jobs: merge adapters into their base, or combine several adapters into one."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from distill.adapters.combine import as_adapter, combine
from distill.adapters.peft_writer import write_adapter
from distill.adapters.stack import Stack, read_adapters
from distill.checkpoints import hf, hf_config
from distill.checkpoints.hub import locate
from distill.errors import InputError
from distill.files.json_file import read_json
from distill.files.tensors import finite
from distill.jobs.loading import Adapters, Path, adapter_stack

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def merge(
  model: Path, *, adapters: Adapters, out: Path, method: str = "sum", density: float = 0.5, seed: int = 0
) -> None:
  """Merges adapters into their base in float32, and writes the merged model in the base's dtypes.

  Args:
    model: Directory of the base, or org/name[@revision] of the hub.
    adapters: PEFT directories or hub names, merged in this order; or the JSON file of an ordered stack.
    out: Directory to write; it is written atomically.
    method: How the adapters' changes are combined: 'sum', 'ties' or 'dare'.
    density: Share of each adapter's change that 'ties' and 'dare' retain, above 0 and at most 1.
    seed: Random seed of the parts that 'dare' drops.

  Raises:
    InputError: The model or an adapter is wrong, `out` cannot be written, or the merged model does not fit the base's
      format or dtypes.
  """
  source, out, stack = _inputs(model, adapters, out, density)
  config, params = hf.load(source)
  merged_config, merged = combine(
    params,
    adapters=read_adapters(stack, config=config),
    config=config,
    method=method,
    density=density,
    seed=seed,
  )
  cast = _cast(merged, base=params, out=out)
  if merged_config == config:
    hf.save(out, config=config, params=cast, tokenizer_from=source, config_from=source)
    return
  written = hf_config.config_to_dict(merged_config)
  names = {entry.ours for entry in hf_config.name_table(merged_config)}
  if hf_config.config_from_dict(written, where=str(out)) != merged_config or names != set(cast):
    raise InputError(
      f"{out}: with these adapters merged, the model does not fit the checkpoint format of {config.family}, for "
      "example because it has a bias where the format has none; use the adapters without merging them"
    )
  special = {key: value for key, value in read_json(source / "config.json").items() if key in _SPECIAL}
  hf.save(out, config=merged_config, params=cast, tokenizer_from=source, special=special)


def merge_adapters(
  model: Path, *, adapters: Adapters, out: Path, rank: int = 0, method: str = "sum", density: float = 0.5, seed: int = 0
) -> dict[str, float]:
  """Combines adapters in float32 and writes them as one PEFT adapter.

  Args:
    model: Directory of the base, or org/name[@revision] of the hub.
    adapters: PEFT directories or hub names, merged in this order; or the JSON file of an ordered stack.
    out: Directory to write; it is written atomically.
    rank: Rank to which the combined change of each module is truncated; 0 truncates nothing.
    method: How the adapters' changes are combined: 'sum', 'ties' or 'dare'; the last two need a rank.
    density: Share of each adapter's change that 'ties' and 'dare' retain, above 0 and at most 1.
    seed: Random seed of the parts that 'dare' drops.

  Returns:
    For each truncated module, by its name, the share of the norm ‖ΔW‖ of its change that remains.

  Raises:
    InputError: The model or an adapter is wrong, `out` cannot be written, or LoRA cannot express the change.
  """
  source, out, stack = _inputs(model, adapters, out, density)
  config, params = hf.load(source)
  shares: dict[str, float] = {}
  factors = as_adapter(
    params,
    adapters=read_adapters(stack, config=config),
    config=config,
    rank=rank,
    report=shares.__setitem__,
    method=method,
    density=density,
    seed=seed,
  )
  write_adapter(out, factors=factors, config=config, base=str(model))
  return shares


def _inputs(model: Path, adapters: Adapters, out: Path, density: float) -> tuple[pathlib.Path, pathlib.Path, Stack]:
  """Finds the directories of base and adapters, and checks the arguments.

  Returns:
    (directory of the base, directory to write, adapters).

  Raises:
    InputError: The base or an adapter is wrong, there are no adapters, `out` is or contains a directory that is
      read, or `density` is 0.
  """
  source, target = locate(model), pathlib.Path(out)
  stack = adapter_stack(adapters)
  if not stack:
    raise InputError("adapters: the list is empty; name at least one adapter")
  if any(path.resolve().is_relative_to(target.resolve()) for path in (source, *(entry.path for entry in stack))):
    raise InputError(f"out={out}: is or contains a directory that this command reads; name another directory")
  if not density:
    raise InputError("density=0: would drop every change of the adapters; give a share above 0 and at most 1")
  return source, target, stack


def _cast(merged: Mapping[str, Any], *, base: Mapping[str, Any], out: pathlib.Path) -> dict[str, np.ndarray]:
  """Casts each parameter to its dtype in the base; a parameter that the base lacks gets the embedding's dtype.

  Raises:
    InputError: A value is not finite after the cast; the message begins with `out`, the directory to write.
  """
  fallback = np.asarray(base["embed.table"]).dtype
  cast = {}
  for name, x in merged.items():
    with np.errstate(over="ignore"):
      cast[name] = np.asarray(x).astype(base[name].dtype if name in base else fallback)
    if not finite(cast[name]):
      raise InputError(
        f"{out}: merged values of {name} exceed the range of the base's {cast[name].dtype}; convert the base to float32"
      )
  return cast
