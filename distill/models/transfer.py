"""Student initialisation: what of the teacher fits is copied, the rest stays fresh."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from distill.errors import InputError
from distill.models.config import Attention, DecoderConfig, GatedDelta
from distill.tree import Params

Array = np.ndarray


def from_teacher(
  fresh: Mapping[str, Any],
  *,
  config: DecoderConfig,
  teacher: Mapping[str, Any],
  teacher_config: DecoderConfig,
  layers: Sequence[int],
) -> tuple[Params, tuple[str, ...]]:
  """Canonical student parameters with everything of the teacher that fits, and the names that were taken over.

  Embeddings, head, norms and MLPs are copied where their shapes agree. Query, key, value and output projections of
  an attention layer seed both kinds of mixer (RADLADS, 2505.03005), the convolution in front of a delta rule passing
  them on unmixed; an ungated teacher's output projection is doubled in a gated student, whose fresh gate passes a half.

  Args:
    fresh: Freshly initialised canonical parameters of the student.
    config: The student's architecture.
    teacher: The teacher's canonical parameters, adapters merged.
    teacher_config: The teacher's architecture.
    layers: Teacher layer that each student layer starts from.

  Raises:
    InputError: `layers` does not name one teacher layer a student layer.
  """
  if len(layers) != len(config.layers) or not all(0 <= j < len(teacher_config.layers) for j in layers):
    raise InputError(
      f"student.layers_from: {tuple(layers)} must name one of the teacher's layers 0 to "
      f"{len(teacher_config.layers) - 1} for each of the student's {len(config.layers)} layers"
    )
  found: Params = {}
  for name in fresh:
    match = re.match(r"layers\.(\d+)\.(.*)", name)
    value = _layer(int(match[1]), match[2], config, teacher, teacher_config, layers) if match else teacher.get(name)
    if value is not None and name.endswith("norm.scale") and ".mixer.norm" not in name:
      value = value + np.float32(teacher_config.norm_offset - config.norm_offset)
    if value is not None and value.shape == fresh[name].shape:
      found[name] = np.asarray(value, np.float32)
  return {**fresh, **found}, tuple(found)


def _layer(index, rest, config, teacher, teacher_config, layers) -> Array | None:
  mixer, source = config.layers[index].mixer, teacher_config.layers[layers[index]].mixer

  def get(suffix: str) -> Array | None:
    value = teacher.get(f"layers.{layers[index]}.{suffix}")
    return None if value is None else np.asarray(value, np.float32)

  if not rest.startswith("mixer."):
    return get(rest)
  if not isinstance(source, Attention):
    return get(rest) if mixer == source else None
  if isinstance(mixer, GatedDelta):
    return _delta(rest, mixer, source, get)
  return _attention(rest, mixer, source, get)


def _attention(rest: str, mixer: Attention, source: Attention, get: Callable[[str], Array | None]) -> Array | None:
  value = get(rest)
  if value is None or mixer.gated == source.gated or mixer.head_dim != source.head_dim:
    return value
  if rest == "mixer.q.kernel" and mixer.gated:
    queries = value.reshape(value.shape[0], -1, source.head_dim)
    return np.concatenate([queries, np.zeros_like(queries)], axis=-1).reshape(value.shape[0], -1)
  return 2 * value if rest == "mixer.o.kernel" and mixer.gated else value


def _delta(rest: str, mixer: GatedDelta, source: Attention, get: Callable[[str], Array | None]) -> Array | None:
  if rest == "mixer.o.kernel":
    return get(rest)
  if rest == "mixer.conv.kernel":
    channels = 2 * mixer.num_key_heads * mixer.key_head_dim + mixer.num_value_heads * mixer.value_head_dim
    return np.eye(mixer.conv_width, dtype=np.float32)[-1:].T.repeat(channels, axis=1)
  if rest != "mixer.qkv.kernel":
    return None
  parts = []
  for name, heads, width in (
    ("q", mixer.num_key_heads, mixer.key_head_dim),
    ("k", mixer.num_key_heads, mixer.key_head_dim),
    ("v", mixer.num_value_heads, mixer.value_head_dim),
  ):
    value = get(f"mixer.{name}.kernel")
    if value is None or width != source.head_dim or heads % (value.shape[1] // width):
      return None
    per_head = value.reshape(value.shape[0], -1, width)
    parts.append(np.repeat(per_head, heads // per_head.shape[1], axis=1).reshape(value.shape[0], -1))
  return np.concatenate(parts, axis=1)
