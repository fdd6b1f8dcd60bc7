"""Describes an adapter in lines of text: its settings, how much it changes each module, what does not load."""

import pathlib
from collections.abc import Iterator, Mapping

import numpy as np

from distill.adapters import edits
from distill.adapters.edits import LowRank
from distill.adapters.layout import layout
from distill.adapters.merging import add_missing_parameters, apply_stack
from distill.adapters.peft import PREFIX, STEM, low_rank_parts, read_with_problems
from distill.adapters.settings import PeftSettings
from distill.adapters.stack import StackedAdapter, StackEntry
from distill.checkpoints import hf
from distill.errors import InputError
from distill.files import safetensors_files
from distill.files.json_file import read_json

# A module is an outlier if it changes this many times more or less than the median module.
_OUTLIER = 5.0
_FLAGS = {"use_rslora": "rsLoRA", "use_dora": "DoRA", "lora_bias": "biases of LoRA"}


def describe(directory: pathlib.Path, *, model: pathlib.Path | None = None) -> Iterator[str]:
  """Yields lines of text about the adapter in a PEFT directory, one fact each.

  If `model`, the directory of its base, is given, changes are also measured relative to the weights of the base.

  Raises:
    InputError: Damaged files, an unsupported adapter, or, after all lines, an adapter that does not fit the base.
  """
  values = read_json(directory / "adapter_config.json")
  kinds = [text for key, text in _FLAGS.items() if values.get(key) is True]
  yield (
    f"adapter: {values.get('peft_type')} of rank {values.get('r')}, alpha {values.get('lora_alpha')}"
    f"{''.join(f', {kind}' for kind in kinds)}"
  )
  yield f"base: {values.get('base_model_name_or_path') or 'not named'}"
  yield f"targets: {_names(values.get('target_modules'))}"
  if saved := values.get("modules_to_save"):
    yield f"stored whole: {_names(saved)}"
  settings = PeftSettings(directory / "adapter_config.json")
  yield from _alone(directory, settings) if model is None else _on(directory, settings, model)


def _names(value: object) -> str:
  return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _alone(directory: pathlib.Path, settings: PeftSettings) -> Iterator[str]:
  """Yields lines about the LoRA factors in a directory, without a base model that would show which tensors fit."""
  tensors = safetensors_files.read(directory, stem=STEM)
  pairs: dict[str, dict[str, np.ndarray]] = {}
  whole, unknown = [], []
  for key, value in sorted(tensors.items()):
    found = low_rank_parts(key.removeprefix(PREFIX))
    if not key.startswith(PREFIX):
      unknown.append(key)
    elif found is None:
      whole.append(key.removeprefix(PREFIX))
    else:
      pairs.setdefault(found[0], {})[found[1]] = value.astype(np.float32)
  facts, norms = {}, {}
  for module, parts in pairs.items():
    a, b = (parts.get(name, parts.get(f"embedding_{name}")) for name in "ab")
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
      if set(parts) == {"tokens"} and parts["tokens"].ndim == 2:
        whole.append(f"{module} ({len(parts['tokens'])} tokens)")
      else:
        unknown.append(f"{PREFIX}{module}")
      continue
    edit = LowRank(a=a.T, b=b.T, scale=settings.scale(module))
    norms[module] = edit.norm
    before = " before the magnitude" if "magnitude" in parts else ""
    facts[module] = f"rank {a.shape[0]}, scale {edit.scale:.4g}, ‖ΔW‖ {edit.norm:.4g}{before}"
  yield from _modules(facts, norms)
  yield from (f"  {name}  replaced" for name in whole)
  yield from (f"would not load: {key}: not a complete pair of LoRA tensors" for key in unknown)


def _on(directory: pathlib.Path, settings: PeftSettings, model: pathlib.Path) -> Iterator[str]:
  """Yields lines with ‖ΔW‖ / ‖W‖ of every HF tensor of the base `model` that the adapter changes."""
  config, params = hf.load(model)
  adapter = read_with_problems(directory, config=config)
  fits = "fits" if adapter.edits and not adapter.problems else "does not fit"
  yield f"model: {model} ({config.family}); the adapter {fits}"
  one: StackedAdapter = (StackEntry(path=directory), adapter)
  base = {**params, **add_missing_parameters(params, adapters=[one], config=config)[1]}
  known = layout(config)
  facts, shares = {}, {}
  for theirs in dict.fromkeys(known.theirs(name) for name, _ in adapter.edits if name in known.shapes):
    names = {entry.ours for entry in known.entries[theirs]} & {name for name, _ in adapter.edits}
    after = apply_stack({name: base[name] for name in names}, adapters=[one], only=names)
    module, own = theirs.removesuffix(".weight"), [edit for name, edit in adapter.edits if name in names]
    change, weight = _norms(after, base)
    shares[module] = change / weight if weight else change
    low = next((edit for edit in own if isinstance(edit, LowRank)), None)
    kind = _kind(own[0]) if low is None else f"rank {low.a.shape[1]}, scale {low.scale:.4g}"
    facts[module] = f"{kind}, ‖ΔW‖ {change:.4g}, {100 * shares[module]:.3g} % of ‖W‖"
  yield from _modules(facts, shares)
  for key, reason in adapter.problems:
    yield f"would not load: {key}: {reason}"
  if fits == "does not fit":
    raise InputError(
      f"{directory}: the adapter does not fit {model}: {len(adapter.problems)} of its tensors would not load; give the "
      "model that it was trained on"
    )


def _norms(after: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray]) -> tuple[float, float]:
  """Returns (‖after − base‖, ‖base‖) over all parameters in `after`.

  If the vocabularies differ in size, the vectors of tokens that only one of the models has are left out.
  """
  change, weight = 0.0, 0.0
  for name, value in after.items():
    common = tuple(slice(0, min(pair)) for pair in zip(value.shape, base[name].shape, strict=True))
    # In float64: the square of what a very large scale adds overflows float32.
    original = np.asarray(base[name], np.float64)[common]
    change += float(np.sum(np.square(value[common] - original)))
    weight += float(np.sum(np.square(original)))
  return change**0.5, weight**0.5


def _kind(edit: edits.Edit) -> str:
  match edit:
    case edits.Replacement():
      return "replaced whole"
    case edits.TokenRows():
      return f"{len(edit.indices)} tokens replaced"
  return "bias"


def _modules(facts: Mapping[str, str], sizes: Mapping[str, float]) -> Iterator[str]:
  """Yields the number of modules, then a line for each module, with a note if its change is zero or an outlier.

  Args:
    facts: Name of the module -> text for its line.
    sizes: Name of the module -> size of its change: ‖ΔW‖, or ‖ΔW‖ / ‖W‖ if the base is known.
  """
  yield f"modules: {len(facts)}"
  changed = [size for size in sizes.values() if size > 0]
  median = float(np.median(changed)) if changed else 0.0
  for module, text in facts.items():
    size, note = sizes[module], ""
    if not size:
      note = "  NO CHANGE (B is zero)" if "rank" in text else "  NO CHANGE"
    elif len(changed) > 2 and not median / _OUTLIER <= size <= median * _OUTLIER:
      note = f"  OUTLIER ({size / median:.3g} times the median)"
    yield f"  {module}  {text}{note}"
