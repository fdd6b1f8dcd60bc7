"""Student initialisation: everything of the teacher that can be is copied, cut or converted; the rest stays fresh."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill.errors import InputError
from distill.initialise.conversion import head_shape, regroup, to_attention, to_experts, to_linear
from distill.initialise.importance import Importance
from distill.initialise.pruning import Heads, cut_channels, most_important, norm_correction, pick
from distill.models.config import DecoderConfig, LayerConfig
from distill.nn.attention import AttentionConfig
from distill.nn.mlp import MlpConfig
from distill.nn.moe import MoeConfig
from distill.tree import Params

Array = np.ndarray
IMPORTANCE = "importance"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
  """What a student layer keeps of its teacher's.

  Attributes:
    layer: The teacher's layer.
    heads: Its heads, where both mixers are of attention or the student's is made from it.
    neurons: Those of the MLP, where both are dense.
  """

  layer: int
  heads: Heads | None
  neurons: np.ndarray | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
  """Where a student starts.

  Attributes:
    params: All its canonical parameters.
    taken: Names of those that come from the teacher.
    channels: The teacher's channels that its residual stream has; None: all.
    kept: For each of its layers what that keeps.
  """

  params: Params
  taken: tuple[str, ...]
  channels: np.ndarray | None
  kept: tuple[Kept, ...]


def needs_importance(config: DecoderConfig, *, teacher: DecoderConfig, layers: Sequence[int] | str) -> bool:
  """Whether layers, channels, heads or neurons of the teacher are left out, or its attention becomes another mixer."""
  if isinstance(layers, str) or config.width < teacher.width:
    return True
  pairs = zip(config.layers, (teacher.layers[i] for i in layers if 0 <= i < len(teacher.layers)), strict=False)
  return any(_changed(one, other) for one, other in pairs)


def _changed(student: LayerConfig, teacher: LayerConfig) -> bool:
  if (
    isinstance(student.mlp, MlpConfig) and isinstance(teacher.mlp, MlpConfig) and student.mlp.width < teacher.mlp.width
  ):
    return True
  if not isinstance(teacher.mixer, AttentionConfig) or not isinstance(student.mixer, AttentionConfig):
    return isinstance(teacher.mixer, AttentionConfig)
  heads, keys, *_ = head_shape(student.mixer)
  same = (heads, keys) == (teacher.mixer.num_heads, teacher.mixer.num_kv_heads)
  # A norm over all heads is corrected for any others.
  return not same and (
    teacher.mixer.qk_norm == "full" or heads < teacher.mixer.num_heads or keys < teacher.mixer.num_kv_heads
  )


def from_teacher(
  fresh: Mapping[str, Any],
  *,
  config: DecoderConfig,
  teacher: Mapping[str, Any],
  teacher_config: DecoderConfig,
  layers: Sequence[int] | str,
  importance: Importance | None = None,
) -> Start:
  """A student with everything of its teacher that can be taken over.

  A narrower student is cut: all layers to the same channels, each layer to the heads and neurons of its own that matter
  most (Muralidharan et al. 2024, 2407.14679), scales of norms corrected for the channels that are gone
  (`norm_correction`). A wider MLP adds fresh neurons whose outputs start at zero. Attention seeds other mixers by its
  projections (`conversion`). Multipliers of the teacher's configuration (on embeddings, scores, residuals, logits) that
  are not the student's are worked into what is taken, so that it computes the same. A mixer with another width of
  heads, an MLP of another form and mixtures of other experts stay fresh; experts take the neurons of a dense MLP.

  Args:
    fresh: Freshly initialised canonical parameters of the student.
    config: The student's architecture.
    teacher: The teacher's canonical parameters, adapters merged.
    teacher_config: The teacher's architecture.
    layers: Teacher layer that each student layer starts from, or 'importance': those that change their input most, in
      their order.
    importance: Of the teacher's parts, where `needs_importance`.

  Raises:
    InputError: `layers` does not name one teacher layer a student layer, the student is wider than its teacher, or one
      table cannot be both the teacher's embedding and its head.
  """
  chosen = choose_layers(layers, config=config, teacher=teacher_config, importance=importance)
  assert importance is not None or not needs_importance(config, teacher=teacher_config, layers=layers)
  ratios = _Ratios.between(teacher_config, config)
  if config.width > teacher_config.width:
    raise InputError(
      f"student.layers_from: the student's width {config.width} is above the teacher's {teacher_config.width}; it can "
      "start from a teacher of at least its width"
    )
  channels = None
  if config.width < teacher_config.width:
    assert importance is not None
    channels = most_important(importance.channels, config.width)
  made = _Start(
    config=config,
    teacher_config=teacher_config,
    teacher=teacher,
    channels=channels,
    kept=tuple(_kept(*pair, config, teacher_config, importance) for pair in enumerate(chosen)),
    importance=importance,
  )
  found: Params = {}
  for name in fresh:
    value = made.parameter(name, fresh[name].shape)
    value = None if value is None else ratios.apply(name, value)
    if value is not None and value.shape == fresh[name].shape:
      found[name] = np.asarray(value, np.float32)
    elif value is not None and (wider := _widened(name, value, fresh[name])) is not None:
      found[name] = wider
  return Start(params={**fresh, **found}, taken=tuple(found), channels=channels, kept=made.kept)


def choose_layers(
  layers: Sequence[int] | str,
  *,
  config: DecoderConfig,
  teacher: DecoderConfig,
  importance: Importance | None,
  key: str = "student.layers_from",
) -> tuple[int, ...]:
  """The teacher layer that each student layer starts from.

  Raises:
    InputError: Not one teacher layer a student layer.
  """
  count, depth = len(config.layers), len(teacher.layers)
  if layers == IMPORTANCE:
    if count > depth:
      raise InputError(
        f"{key}: importance leaves layers out, but the student has {count}, the teacher {depth}; list "
        "teacher layers, some of them twice"
      )
    assert importance is not None
    return tuple(map(int, most_important(importance.layers, count)))
  if isinstance(layers, str) or len(layers) != count or not all(0 <= j < depth for j in layers):
    shown = repr(layers) if isinstance(layers, str) else str(tuple(layers))
    raise InputError(
      f"{key}: {shown} must name one of the teacher's layers 0 to {depth - 1} for each of the student's "
      f"{count} layers, or be importance"
    )
  return tuple(layers)


def upcycles(mixture: MoeConfig, source: MlpConfig | MoeConfig | None) -> bool:
  """Whether the experts of a mixture can be made of a teacher's MLP: of its form, and together at least as wide."""
  if (
    not isinstance(source, MlpConfig)
    or not source.gated
    or source.use_bias
    or source.width > mixture.num_experts * mixture.width
  ):
    return False
  return not mixture.use_bias and mixture.clamp is None and mixture.act == source.act


def _kept(index, layer, config, teacher, importance) -> Kept:
  student, source = config.layers[index], teacher.layers[layer]
  heads = neurons = None
  if isinstance(source.mixer, AttentionConfig):
    heads = regroup(student.mixer, source.mixer, scores=None if importance is None else importance.heads[layer])
  if isinstance(student.mlp, MlpConfig) and isinstance(source.mlp, MlpConfig) and student.mlp.gated == source.mlp.gated:
    neurons = np.arange(source.mlp.width)
    if student.mlp.width < source.mlp.width:
      neurons = most_important(importance.neurons[layer], student.mlp.width)
  return Kept(layer=layer, heads=heads, neurons=neurons)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Start:
  """The teacher's parameters as the student's, before multipliers."""

  config: DecoderConfig
  teacher_config: DecoderConfig
  teacher: Mapping[str, Any]
  channels: np.ndarray | None
  kept: tuple[Kept, ...]
  importance: Importance | None

  def parameter(self, name: str, shape: tuple[int, ...]) -> Array | None:
    """The student's parameter of that name, as far as it comes from the teacher."""
    match = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
    if not match:
      return self._frame(name, shape)
    index, rest = int(match[1]), match[2]
    kept = self.kept[index]
    if rest.startswith("mixer."):
      return self._mixer(index, rest.removeprefix("mixer."))
    mixture, source = self.config.layers[index].mlp, self.teacher_config.layers[kept.layer].mlp
    if rest.startswith("mlp.") and isinstance(mixture, MoeConfig) and upcycles(mixture, source):
      assert isinstance(source, MlpConfig)
      if rest == "mlp.shared.down.kernel":
        return np.zeros(shape, np.float32)
      get = lambda name: self._get(f"layers.{kept.layer}.mlp.{name}")  # noqa: E731
      return to_experts(rest.removeprefix("mlp."), mixture=mixture, source=source, get=get)
    value = self._get(f"layers.{kept.layer}.{rest}")
    if rest.startswith("mlp.") and value is not None:
      return self._mlp(index, rest.removeprefix("mlp."), value)
    return value

  def _get(self, name: str) -> Array | None:
    """The teacher's parameter of that name, cut to the student's channels."""
    if name not in self.teacher:
      return None
    value = cut_channels(name, np.asarray(self.teacher[name], np.float32), self.channels)
    if self.channels is not None and name.endswith("norm.scale") and ".mixer." not in name:
      value = self._corrected(value, name, self.channels)
    return value

  def _corrected(self, scale: Array, name: str, kept: Sequence[int] | np.ndarray) -> Array:
    assert self.importance is not None
    factor = norm_correction(self.importance.shares[name.removesuffix(".scale")], kept)
    offset = np.float32(self.teacher_config.norm_offset)
    return (scale + offset) * np.float32(factor) - offset

  def _frame(self, name: str, shape: tuple[int, ...]) -> Array | None:
    """A parameter outside the layers; the head of a tied teacher is its embedding."""
    if name == "head.kernel" and name not in self.teacher:
      table = self._get("embed.table")
      return None if table is None else table.T
    value = self._get(name)
    return value[: shape[0]] if name == "positions.table" and value is not None else value

  def _mixer(self, index: int, rest: str) -> Array | None:
    kept = self.kept[index]
    mixer, source = self.config.layers[index].mixer, self.teacher_config.layers[kept.layer].mixer
    prefix = f"layers.{kept.layer}.mixer."
    if not isinstance(source, AttentionConfig):
      return self._get(prefix + rest) if mixer == source else None
    if kept.heads is None:
      return None
    offset = self.teacher_config.norm_offset
    get = lambda name: self._get(prefix + name)  # noqa: E731
    if not isinstance(mixer, AttentionConfig):
      assert self.importance is not None
      power, mean = self.importance.power[kept.layer], self.importance.means[kept.layer]
      mean = mean if self.channels is None else mean[self.channels]
      return to_linear(rest, mixer=mixer, source=source, heads=kept.heads, get=get, power=power, mean=mean)
    value = to_attention(rest, mixer=mixer, source=source, heads=kept.heads, get=get, offset=offset)
    full = source.qk_norm == "full" and rest in ("q_norm.scale", "k_norm.scale")
    return self._full_norm(value, prefix + rest, kept.heads, source) if full and value is not None else value

  def _full_norm(self, scale: Array, name: str, heads: Heads, source: AttentionConfig) -> Array:
    """The scale of a norm over all heads, of which the student has others."""
    count = source.num_heads if name.endswith("q_norm.scale") else source.num_kv_heads
    chosen = [(one,) for one in heads.queries] if name.endswith("q_norm.scale") else list(heads.keys)
    if chosen == [(one,) for one in range(count)]:
      return scale
    size = source.head_dim
    inputs = [head * size + i for one in chosen for head in one[:1] for i in range(size)]
    return self._corrected(scale, name, inputs)

  def _mlp(self, index: int, rest: str, value: Array) -> Array | None:
    kept = self.kept[index]
    mlp, source = self.config.layers[index].mlp, self.teacher_config.layers[kept.layer].mlp
    if kept.neurons is None or not isinstance(source, MlpConfig):
      if not isinstance(mlp, MoeConfig) or not isinstance(source, MoeConfig):
        return None
      return value if (mlp.num_experts, mlp.width) == (source.num_experts, source.width) else None
    if rest == "down.bias" or len(kept.neurons) == source.width:
      return value
    return pick(value, list(map(int, kept.neurons)), axis=0 if rest == "down.kernel" else -1, units=source.width)


def _widened(name: str, value: Array, fresh: Any) -> Array | None:
  """The parameter of a wider MLP: the teacher's neurons, then fresh ones that add nothing yet."""
  found = re.fullmatch(r"layers\.\d+\.mlp\.(gate|up|down)\.(kernel|bias)", name)
  if not found or any(one > other for one, other in zip(value.shape, fresh.shape, strict=True)):
    return None
  wider = np.zeros(fresh.shape, np.float32) if found[1] == "down" else np.array(fresh, np.float32)
  wider[tuple(slice(size) for size in value.shape)] = value
  return wider


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ratios:
  """What the teacher multiplies by over what the student does, and how their norms are stored.

  Attributes:
    final: Of the final norm's output, where one table is the embedding and the head and cannot hold both multipliers.
    offsets: (the teacher's norm offset, the student's), or None where their norms are of different kinds.
  """

  embedding: float
  logits: float
  residual: float
  final: float
  offsets: tuple[float, float] | None

  @classmethod
  def between(cls, teacher: DecoderConfig, student: DecoderConfig) -> "_Ratios":
    embedding, logits = teacher.embed_scale / student.embed_scale, teacher.logit_scale / student.logit_scale
    uneven = student.tie_embeddings and not np.isclose(embedding, logits)
    if uneven and teacher.norm != student.norm:
      raise InputError(
        f"student.layers_from: the teacher's embeddings are scaled by {embedding:g} of the student's, its logits "
        f"by {logits:g}; set tie_word_embeddings to false in student.config"
      )
    return cls(
      embedding=embedding,
      logits=logits,
      residual=teacher.residual_scale / student.residual_scale,
      final=logits / embedding if uneven else 1.0,
      offsets=(teacher.norm_offset, student.norm_offset) if teacher.norm == student.norm else None,
    )

  def apply(self, name: str, value: Array) -> Array | None:
    """A parameter of the teacher as the student's of that name."""
    if name.endswith(("norm.scale", "norm.bias")) and ".mixer." not in name and self.offsets is None:
      return None
    if name == "norm.bias":
      return value * np.float32(self.final)
    if name.endswith("norm.scale") and ".mixer.norm" not in name and self.offsets is not None:
      factor = np.float32(self.final if name == "norm.scale" else 1.0)
      return (value + np.float32(self.offsets[0])) * factor - np.float32(self.offsets[1])
    factors = {"embed.table": self.embedding, "head.kernel": self.logits}
    if re.search(r"\.(mixer\.o|mlp\.down|mlp\.(experts|shared)\.down)\.(kernel|bias)$", name):
      return value * np.float32(self.residual)
    return value * np.float32(factors.get(name, 1.0))
