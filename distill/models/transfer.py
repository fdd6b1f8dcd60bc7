"""Student initialisation: what of the teacher fits is copied, the rest stays fresh."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from distill.errors import InputError
from distill.models.config import DecoderConfig
from distill.nn.attention import Attention
from distill.nn.gated_delta import GatedDelta
from distill.nn.mamba2 import Mamba2
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
  an attention layer seed every kind of mixer (RADLADS, 2505.03005; for state spaces 2408.15237), the convolution in
  front of a recurrent one passing them on unmixed; an ungated teacher's output projection is doubled in a gated
  student, whose fresh gate passes a half.
  Multipliers of the teacher's configuration (on embeddings, scores, residuals, logits) that are not the student's are
  worked into what is copied, so that it computes the same.

  Args:
    fresh: Freshly initialised canonical parameters of the student.
    config: The student's architecture.
    teacher: The teacher's canonical parameters, adapters merged.
    teacher_config: The teacher's architecture.
    layers: Teacher layer that each student layer starts from.

  Raises:
    InputError: `layers` does not name one teacher layer a student layer, or one table cannot be both the teacher's
      embedding and its head.
  """
  if len(layers) != len(config.layers) or not all(0 <= j < len(teacher_config.layers) for j in layers):
    raise InputError(
      f"student.layers_from: {tuple(layers)} must name one of the teacher's layers 0 to "
      f"{len(teacher_config.layers) - 1} for each of the student's {len(config.layers)} layers"
    )
  ratios = _Ratios.between(teacher_config, config)
  if config.tie_embeddings and not np.isclose(ratios.embedding, ratios.logits):
    raise InputError(
      f"student.layers_from: the teacher's embeddings are scaled by {ratios.embedding:g} of the student's, its logits "
      f"by {ratios.logits:g}; set tie_word_embeddings to false in student.config"
    )
  found: Params = {}
  for name in fresh:
    match = re.match(r"layers\.(\d+)\.(.*)", name)
    value = _layer(int(match[1]), match[2], config, teacher, teacher_config, layers) if match else _frame(name, teacher)
    value = None if value is None else ratios.apply(name, np.asarray(value, np.float32))
    if value is not None and value.shape == fresh[name].shape:
      found[name] = np.asarray(value, np.float32)
  return {**fresh, **found}, tuple(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ratios:
  """What the teacher multiplies by over what the student does, and how their norms are stored.

  Attributes:
    offsets: (the teacher's norm offset, the student's), or None where their norms are of different kinds.
  """

  embedding: float
  logits: float
  residual: float
  offsets: tuple[float, float] | None

  @classmethod
  def between(cls, teacher: DecoderConfig, student: DecoderConfig) -> "_Ratios":
    return cls(
      embedding=teacher.embed_scale / student.embed_scale,
      logits=teacher.logit_scale / student.logit_scale,
      residual=teacher.residual_scale / student.residual_scale,
      offsets=(teacher.norm_offset, student.norm_offset) if teacher.norm == student.norm else None,
    )

  def apply(self, name: str, value: Array) -> Array | None:
    """A parameter of the teacher as the student's of that name."""
    if name.endswith(("norm.scale", "norm.bias")) and ".mixer." not in name and self.offsets is None:
      return None
    if name.endswith("norm.scale") and ".mixer.norm" not in name and self.offsets is not None:
      return value + np.float32(self.offsets[0] - self.offsets[1])
    factors = {"embed.table": self.embedding, "head.kernel": self.logits}
    if re.search(r"\.(mixer\.o|mlp\.down|mlp\.experts\.down|mlp\.shared\.down)\.(kernel|bias)$", name):
      return value * np.float32(self.residual)
    return value * np.float32(factors.get(name, 1.0))


def _frame(name: str, teacher: Mapping[str, Any]) -> Array | None:
  """A parameter outside the layers; the head of a tied teacher is its embedding."""
  if name == "head.kernel" and name not in teacher:
    return np.asarray(teacher["embed.table"]).T
  return teacher.get(name)


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
  if isinstance(mixer, Mamba2):
    return _space(rest, mixer, source, get)
  return _attention(rest, mixer, source, get, offset=teacher_config.norm_offset)


def _scale(spec: Attention) -> float:
  return spec.head_dim**-0.5 if spec.scale is None else spec.scale


def _attention(
  rest: str, mixer: Attention, source: Attention, get: Callable[[str], Array | None], *, offset: float
) -> Array | None:
  value = get(rest)
  if value is None or mixer.head_dim != source.head_dim:
    return value
  scores = np.float32(_scale(source) / _scale(mixer))
  if rest == "mixer.q_norm.scale":
    return (value + np.float32(offset)) * scores - np.float32(offset)
  if rest in ("mixer.q.kernel", "mixer.q.bias"):
    value = value if mixer.qk_norm else value * scores
    if mixer.gated and not source.gated:
      queries = value.reshape(*value.shape[:-1], -1, source.head_dim)
      return np.concatenate([queries, np.zeros_like(queries)], axis=-1).reshape(*value.shape[:-1], -1)
  return 2 * value if rest == "mixer.o.kernel" and mixer.gated and not source.gated else value


def _delta(rest: str, mixer: GatedDelta, source: Attention, get: Callable[[str], Array | None]) -> Array | None:
  if rest == "mixer.o.kernel":
    return get(rest)
  found = re.fullmatch(r"mixer\.(conv\.)?([qkv])\.kernel", rest)
  if found is None:
    return None
  name = found[2]
  heads, width = (
    (mixer.num_value_heads, mixer.value_head_dim) if name == "v" else (mixer.num_key_heads, mixer.key_head_dim)
  )
  if found[1]:
    return np.eye(mixer.conv_width, dtype=np.float32)[-1:].T.repeat(heads * width, axis=1)
  return _repeated(get(rest), heads=heads, width=width, source=source)


def _space(rest: str, mixer: Mamba2, source: Attention, get: Callable[[str], Array | None]) -> Array | None:
  """Values become inputs, keys what writes to the state and queries what reads from it, repeated over heads."""
  if rest == "mixer.o.kernel":
    return get(rest)
  inner, shared = mixer.num_heads * mixer.head_dim, mixer.num_groups * mixer.state_size
  parts = {
    "x": ("v", mixer.num_heads, mixer.head_dim, inner),
    "b": ("k", mixer.num_groups, mixer.state_size, shared),
    "c": ("q", mixer.num_groups, mixer.state_size, shared),
  }
  found = re.fullmatch(r"mixer\.(conv\.)?([xbc])\.kernel", rest)
  if not found:
    return None
  name, heads, width, channels = parts[found[2]]
  if found[1]:
    return np.eye(mixer.conv_width, dtype=np.float32)[-1:].T.repeat(channels, axis=1)
  return _repeated(get(f"mixer.{name}.kernel"), heads=heads, width=width, source=source)


def _repeated(value: Array | None, *, heads: int, width: int, source: Attention) -> Array | None:
  """A kernel with each of the source's heads as often as `heads` of them make; None where they do not."""
  if value is None or width != source.head_dim or heads % (value.shape[1] // width):
    return None
  per_head = value.reshape(value.shape[0], -1, width)
  return np.repeat(per_head, heads // per_head.shape[1], axis=1).reshape(value.shape[0], -1)
