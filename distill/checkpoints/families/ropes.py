"""Reads the rotary embedding (rope) of config.json as all versions of transformers write it, and writes version 5's."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from distill.checkpoints.attributes import Attributes
from distill.errors import InputError
from distill.files.json_file import flag
from distill.nn.rope import DynamicNtk, Interpolation, Llama3, LongRope, RopeConfig, Scaling, Yarn, frequencies


def read_rope(
  have: Attributes, *, head_dim: int, theta: float = 10_000.0, partial: bool = False, fraction: float = 1.0
) -> RopeConfig:
  """Returns the rotary embedding that `rope_parameters`, or `rope_scaling` and `rope_theta`, describe.

  Args:
    have: The keys of config.json.
    head_dim: Width of a head.
    theta: The family's default for `rope_theta`.
    partial: True if models of the family may rotate only a fraction of each head.
    fraction: The family's default for `partial_rotary_factor`.

  Raises:
    InputError: The type of rope is unknown, or a setting is unknown, missing or wrong.
  """
  fields = _mapping(have, "rope_parameters")
  fields = _mapping(have, "rope_scaling") or fields
  for key in ("rope_theta", "partial_rotary_factor"):
    if (value := have.get(key)) is not None:
      fields.setdefault(key, value)
  return _rope(have, fields, head_dim=head_dim, theta=theta, partial=partial, fraction=fraction)


def read_nested_ropes(
  have: Attributes, *, head_dim: int, theta: tuple[float, float], local_theta_key: str | None = None
) -> tuple[RopeConfig, RopeConfig]:
  """Returns the rotary embeddings of layers with full attention and of layers with a sliding window.

  Version 5 of transformers writes one object for each layer type into `rope_parameters`. Before it, `rope_scaling` and
  `rope_theta` described the layers with full attention only.

  Args:
    have: The keys of config.json.
    head_dim: Width of a head.
    theta: The family's defaults for `rope_theta` of full and of sliding layers.
    local_theta_key: The key that held `rope_theta` of sliding layers before version 5, if there was one.

  Returns:
    (rope of full layers, rope of sliding layers).

  Raises:
    InputError: The type of a rope is unknown, or a setting is unknown, missing or wrong.
  """
  nested = _mapping(have, "rope_parameters")
  unknown = set(nested) - {"full_attention", "sliding_attention"}
  if unknown:
    raise InputError(
      f"{have.where}: rope_parameters holds {min(unknown)!r}; expected only full_attention and sliding_attention"
    )
  full, sliding = (dict(nested.get(kind) or {}) for kind in ("full_attention", "sliding_attention"))
  full |= _mapping(have, "rope_scaling")
  for fields, key in ((full, "rope_theta"), (sliding, local_theta_key)):
    if key is not None and (value := have.get(key)) is not None:
      fields.setdefault("rope_theta", value)
  for fields in (full, sliding):
    # transformers 5 looks for `truncate` outside the nested objects, so that inside it has no effect.
    fields.pop("truncate", None)
  ropes = (_rope(have, x, head_dim=head_dim, theta=y) for x, y in zip((full, sliding), theta, strict=True))
  return next(ropes), next(ropes)


def _mapping(have: Attributes, key: str) -> dict[str, Any]:
  value = have.get(key) or {}
  if not isinstance(value, Mapping):
    raise InputError(f"{have.where}: {key} = {value!r} must be an object of rotary settings")
  return {name: x for name, x in value.items() if x is not None}


def _rope(
  have: Attributes,
  fields: dict[str, Any],
  *,
  head_dim: int,
  theta: float,
  partial: bool = False,
  fraction: float = 1.0,
) -> RopeConfig:
  fields = dict(fields)
  theta = have.finite("rope_theta", fields.pop("rope_theta", theta))
  fraction = have.finite("partial_rotary_factor", fields.pop("partial_rotary_factor", fraction))
  if not 0.0 < fraction <= 1.0 or (fraction != 1.0 and not partial):
    expected = "a number above 0 and at most 1" if partial else "1.0"
    raise InputError(f"{have.where}: partial_rotary_factor = {fraction} is not supported; expected {expected}")
  rotated = int(head_dim * fraction)
  if rotated < 2 or (rotated % 2 and rotated == head_dim) or theta <= 1.0:
    raise InputError(
      f"{have.where}: rope needs an even number of rotated channels and rope_theta above 1, but has {rotated} channels "
      f"and rope_theta {theta}; correct head_dim or the rope settings"
    )
  kind = fields.pop("rope_type", fields.pop("type", "default"))
  fields.pop("type", None)
  outer = have.get("original_max_position_embeddings")
  if outer is not None:
    fields["original_max_position_embeddings"] = outer
  reader = _ScalingReader(have, fields, kind=str(kind), pairs=-(-rotated // 2))
  scaling = reader.read()
  # mrope interleaves image axes, which coincide with plain positions on text.
  left = [key for key in reader.fields if not key.startswith("mrope_")]
  if left:
    raise InputError(f"{have.where}: rope type {kind!r} does not take the setting {min(left)!r}; correct one of them")
  rope = RopeConfig(theta=theta, fraction=fraction, scaling=scaling)
  with np.errstate(all="ignore"):
    inverse, _ = frequencies(head_dim, rope=rope, length=have.integer("max_position_embeddings", 2048))
  if not np.isfinite(inverse).all():
    raise InputError(
      f"{have.where}: rope type {kind!r} gives frequencies that are not finite; compare its settings with the original"
    )
  return rope


class _ScalingReader:
  """Reads the settings of one type of rope scaling from the dictionary `fields`.

  Every setting that is read is removed from `fields`; those left at the end do not belong to the type.
  """

  def __init__(self, have: Attributes, fields: dict[str, Any], *, kind: str, pairs: int):
    self.have, self.fields, self.kind, self.pairs = have, fields, kind, pairs

  def read(self) -> Scaling | None:
    positions = self.have.integer("max_position_embeddings", 2048)
    original = int(self.number("original_max_position_embeddings", positions, low=2.0, high=2.0**31))
    if self.kind == "default":
      return None
    if self.kind == "linear":
      return Interpolation(factor=self.number("factor"))
    if self.kind == "dynamic":
      if self.pairs < 2:
        raise InputError(
          f"{self.have.where}: rope type 'dynamic' needs more than two rotated channels; use another type"
        )
      return DynamicNtk(factor=self.number("factor"), max_positions=positions)
    if self.kind == "llama3":
      low, high = self.number("low_freq_factor"), self.number("high_freq_factor")
      if low >= high:
        raise InputError(
          f"{self.have.where}: low_freq_factor {low} must be below high_freq_factor {high}; correct one of them"
        )
      factor = self.number("factor")
      return Llama3(factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_positions=original)
    if self.kind == "yarn":
      return self._yarn(original, positions)
    if self.kind == "longrope":
      return self._longrope(original, positions)
    raise InputError(
      f"{self.have.where}: rope type {self.kind!r} is not supported; "
      "expected default, linear, dynamic, llama3, yarn or longrope"
    )

  def number(self, key: str, default: float | None = None, *, low: float = 1e-6, high: float = 1e6) -> float:
    value = self.fields.pop(key, default)
    if value is None:
      raise InputError(f"{self.have.where}: rope type {self.kind!r} needs the setting {key}; add it")
    return self.have.finite(key, value, low=low, high=high)

  def _yarn(self, original: int, positions: int) -> Yarn:
    factor = self.number("factor", positions / original)
    # Says how the weights were trained, not what they compute.
    self.fields.pop("finetuned", None)

    def mscale(weight: float) -> float:
      return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    one, every = self.number("mscale", 0.0, low=0.0), self.number("mscale_all_dim", 0.0, low=0.0)
    inferred = mscale(one) / mscale(every) if one and every else mscale(1.0)
    return Yarn(
      factor=factor,
      original_max_positions=original,
      attention_factor=self.number("attention_factor", inferred),
      beta_fast=self._beta("beta_fast", 32.0),
      beta_slow=self._beta("beta_slow", 1.0),
      truncate=flag(self.fields.pop("truncate", True), where=f"{self.have.where}: truncate"),
    )

  def _beta(self, key: str, default: float) -> float:
    # transformers takes 0 for absent.
    if not self.fields.get(key, default):
      self.fields.pop(key)
    return self.number(key, default)

  def _longrope(self, original: int, positions: int) -> LongRope:
    factor = self.number("factor", positions / original)
    inferred = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    factors = []
    for key in ("short_factor", "long_factor"):
      value = self.fields.pop(key, None)
      if not isinstance(value, list | tuple) or len(value) != self.pairs:
        raise InputError(
          f"{self.have.where}: {key} must be a list of {self.pairs} numbers, one for each rotated pair of channels"
        )
      factors.append(tuple(self.have.finite(key, x, low=1e-6, high=1e6) for x in value))
    return LongRope(
      short=factors[0],
      long=factors[1],
      original_max_positions=original,
      attention_factor=self.number("attention_factor", inferred),
    )


def write_rope(rope: RopeConfig) -> dict[str, Any]:
  """Returns the value of `rope_parameters` in config.json, as version 5 of transformers writes it."""
  fields: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": "default"}
  scaling = rope.scaling
  match scaling:
    case Interpolation():
      fields |= {"rope_type": "linear", "factor": scaling.factor}
    case DynamicNtk():
      fields |= {"rope_type": "dynamic", "factor": scaling.factor}
    case Llama3():
      fields |= {"rope_type": "llama3", "factor": scaling.factor}
      fields |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    case Yarn():
      names = ("factor", "attention_factor", "beta_fast", "beta_slow", "truncate")
      fields |= {"rope_type": "yarn", **{name: getattr(scaling, name) for name in names}}
    case LongRope():
      fields |= {"rope_type": "longrope", "short_factor": list(scaling.short), "long_factor": list(scaling.long)}
      fields |= {"attention_factor": scaling.attention_factor}
  if isinstance(scaling, Llama3 | Yarn | LongRope):
    fields["original_max_position_embeddings"] = scaling.original_max_positions
  if rope.fraction != 1.0:
    fields["partial_rotary_factor"] = rope.fraction
  return fields
