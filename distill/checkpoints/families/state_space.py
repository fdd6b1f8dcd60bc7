"""Functions that families with Mamba-2 mixers share: keys of config.json, in two sets of names, and tensor names."""

import math
from collections.abc import Mapping
from typing import Any

from distill.checkpoints.attributes import Attributes
from distill.checkpoints.families.common import fused, linear
from distill.checkpoints.name_table import TensorEntry
from distill.errors import InputError
from distill.files.json_file import number
from distill.models.config import DecoderConfig
from distill.nn.attention import AttentionConfig
from distill.nn.mamba2 import Mamba2Config

# Fields of `Mamba2Config` -> keys of config.json, in two sets.
PLAIN = {
  "num_heads": "num_heads",
  "head_dim": "head_dim",
  "state_size": "state_size",
  "num_groups": "n_groups",
  "conv_width": "conv_kernel",
  "conv_bias": "use_conv_bias",
  "use_bias": "use_bias",
  "expand": "expand",
}
PREFIXED = {
  "num_heads": "mamba_n_heads",
  "head_dim": "mamba_d_head",
  "state_size": "mamba_d_state",
  "num_groups": "mamba_n_groups",
  "conv_width": "mamba_d_conv",
  "conv_bias": "mamba_conv_bias",
  "use_bias": "mamba_proj_bias",
  "expand": "mamba_expand",
}
LINEAR, FULL = "linear_attention", "full_attention"


def read_mixer(have: Attributes, words: Mapping[str, str], *, defaults: Mapping[str, int]) -> Mamba2Config:
  """Returns the Mamba-2 mixer that the keys of a config.json describe.

  Args:
    have: The keys of config.json.
    words: Name of a size or option, such as 'num_heads' -> the family's key for it; `PLAIN` or `PREFIXED`.
    defaults: The family's defaults of `num_heads`, `state_size` and `num_groups`, and of `head_dim` if it does not
      follow from the other sizes.

  Raises:
    InputError: A key has a wrong value, the sizes do not fit each other, or the range of time steps is empty.
  """
  where, width = have.where, have.integer("hidden_size")
  heads = have.integer(words["num_heads"], defaults["num_heads"])
  inner = have.integer(words["expand"], 2) * width
  size = have.get(words["head_dim"])
  follows = size == "auto" or (size is None and "head_dim" not in defaults)
  size = max(inner // heads, 1) if follows else have.integer(words["head_dim"], defaults.get("head_dim"))
  if heads * size != inner:
    product = f"{words['num_heads']} {heads} * {words['head_dim']} {size}"
    raise InputError(f"{where}: {product} must equal {words['expand']} * hidden_size = {inner}; correct one of them")
  groups = have.integer(words["num_groups"], defaults["num_groups"])
  if heads % groups:
    raise InputError(
      f"{where}: {words['num_groups']} {groups} does not divide {words['num_heads']} {heads}; correct one of them"
    )
  low, high = _limits(have)
  return Mamba2Config(
    num_heads=heads,
    head_dim=size,
    state_size=have.integer(words["state_size"], defaults["state_size"]),
    num_groups=groups,
    conv_width=have.integer(words["conv_width"], 4),
    conv_bias=have.flag(words["conv_bias"], True),
    use_bias=have.flag(words["use_bias"]),
    min_step=low,
    max_step=high,
  )


def _limits(have: Attributes) -> tuple[float, float | None]:
  """Returns (lowest, highest) time step from `time_step_limit`; None stands for an infinite highest one."""
  key, value = f"{have.where}: time_step_limit", have.take("time_step_limit", [0.0, math.inf])
  if not isinstance(value, list | tuple) or len(value) != 2:
    raise InputError(f"{key} = {value!r} must be two numbers, the smallest and the largest time step")
  low, high = number(value[0], where=key, low=0.0), value[1]
  if high == math.inf or high == {"__float__": "Infinity"}:
    return low, None
  return low, number(high, where=key, low=low)


def write_mixer(spec: Mamba2Config | None, words: Mapping[str, str], *, width: int) -> dict[str, Any]:
  """Returns the keys of config.json for a Mamba-2 mixer.

  Args:
    spec: The mixer; None, for a model without one, returns placeholders that `read_mixer` accepts.
    words: Name of a size or option, such as 'num_heads' -> the family's key for it; `PLAIN` or `PREFIXED`.
    width: Width of the model.

  Raises:
    InputError: The width of the mixer is no multiple of the width of the model, which the keys cannot express.
  """
  if spec is None:
    return {words["num_heads"]: 1, words["head_dim"]: "auto"}
  expand, rest = divmod(spec.num_heads * spec.head_dim, width)
  if rest or not expand:
    product = f"{words['num_heads']} {spec.num_heads} * {words['head_dim']} {spec.head_dim}"
    raise InputError(f"{product} must be a multiple of hidden_size {width}; change one of these sizes")
  fields = {word: getattr(spec, name) for name, word in words.items() if name != "expand"} | {words["expand"]: expand}
  if spec.min_step or spec.max_step is not None:
    fields["time_step_limit"] = [spec.min_step, math.inf if spec.max_step is None else spec.max_step]
  return fields


def mixer(ours: str, theirs: str, *, spec: Mamba2Config) -> list[TensorEntry]:
  """Returns the name-table entries (parameter, tensor) of one Mamba-2 mixer.

  Checkpoints concatenate its projections, and also its convolutions.

  Args:
    ours: Start of the canonical names of its parameters.
    theirs: Start of the names of its tensors in the checkpoint.
    spec: Configuration of the mixer.
  """
  inner, shared = spec.num_heads * spec.head_dim, spec.num_groups * spec.state_size
  convolved = {"x": inner, "b": shared, "c": shared}
  projected = {"z": inner, **convolved, "dt": spec.num_heads}
  rows = fused(projected, ours=f"{ours}.{{}}.kernel", theirs=f"{theirs}.in_proj.weight")
  rows += fused(convolved, ours=f"{ours}.conv.{{}}.kernel", theirs=f"{theirs}.conv1d.weight", form="conv")
  if spec.use_bias:
    rows += fused(projected, ours=f"{ours}.{{}}.bias", theirs=f"{theirs}.in_proj.bias", form="copy")
  if spec.conv_bias:
    rows += fused(convolved, ours=f"{ours}.conv.{{}}.bias", theirs=f"{theirs}.conv1d.bias", form="copy")
  rows += [
    TensorEntry(f"{ours}.{x}", f"{theirs}.{y}") for x, y in (("dt_bias", "dt_bias"), ("a_log", "A_log"), ("skip", "D"))
  ]
  return [
    *rows,
    TensorEntry(f"{ours}.norm.scale", f"{theirs}.norm.weight"),
    *linear(f"{ours}.o", f"{theirs}.out_proj", bias=spec.use_bias),
  ]


def kinds(config: DecoderConfig) -> tuple[AttentionConfig | None, Mamba2Config | None]:
  """Returns (attention, Mamba-2 mixer) of a hybrid model, with None in place of one that no layer has."""
  mixers = [layer.mixer for layer in config.layers]
  full = next((one for one in mixers if isinstance(one, AttentionConfig)), None)
  return full, next((one for one in mixers if isinstance(one, Mamba2Config)), None)


def written_heads(spec: AttentionConfig | None) -> dict[str, Any]:
  """Returns the keys of config.json for a hybrid model's attention; valid placeholders if `spec` is None."""
  if spec is None:
    return {"num_attention_heads": 1, "num_key_value_heads": 1}
  sizes = {"num_attention_heads": spec.num_heads, "num_key_value_heads": spec.num_kv_heads, "head_dim": spec.head_dim}
  return {**sizes, "attention_bias": spec.use_bias}
