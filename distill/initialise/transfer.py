"""Initialises a student from its teacher: copies, cuts or converts whatever fits. The rest stays random (fresh)."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill.errors import InputError
from distill.initialise.importance import Importance
from distill.initialise.mixers import TeacherMixer, conversion
from distill.initialise.mlps import choose_neurons, convert_mlp, loses_neurons, widen
from distill.initialise.multipliers import MultiplierRatios
from distill.initialise.pruning import Heads, cut_channels, most_important, norm_correction
from distill.models.config import DecoderConfig
from distill.tree import Params

Array = np.ndarray
IMPORTANCE = "importance"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetainedParts:
  """The parts of the teacher that one student layer starts from.

  Attributes:
    layer: Index of the teacher layer.
    heads: The attention heads chosen in that layer; None where the whole mixer is copied or stays random.
    neurons: Indices of the chosen neurons of its MLP; None unless both MLPs are dense, and both or neither have a gate.
  """

  layer: int
  heads: Heads | None
  neurons: Array | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitialStudent:
  """A student before its first training step, and the parts of the teacher that it starts from.

  Attributes:
    params: All canonical parameters of the student.
    taken: Names of the parameters that come from the teacher.
    channels: Indices of the teacher's channels that the student's residual stream retains; None for all.
    retained: For each student layer, the teacher layer that it starts from, with the chosen heads and neurons.
  """

  params: Params
  taken: tuple[str, ...]
  channels: Array | None
  retained: tuple[RetainedParts, ...]


def needs_importance(config: DecoderConfig, *, teacher: DecoderConfig, layers: Sequence[int] | str) -> bool:
  """Returns True if `from_teacher` needs `importance`, to choose parts or to read sizes of activations.

  Args:
    config: The student's architecture.
    teacher: The teacher's architecture.
    layers: The argument `layers` of `from_teacher`; indices of layers that the teacher lacks are ignored.
  """
  if isinstance(layers, str) or config.width < teacher.width:
    return True
  pairs = zip(config.layers, (teacher.layers[i] for i in layers if 0 <= i < len(teacher.layers)), strict=False)
  return any(
    loses_neurons(layer.mlp, source.mlp)
    or conversion(layer.mixer, source.mixer).needs_importance(layer.mixer, source.mixer)
    for layer, source in pairs
  )


def from_teacher(
  fresh: Mapping[str, Any],
  *,
  config: DecoderConfig,
  teacher: Mapping[str, Any],
  teacher_config: DecoderConfig,
  layers: Sequence[int] | str,
  importance: Importance | None = None,
) -> InitialStudent:
  """Returns a student whose parameters are taken from its teacher wherever they fit.

  A narrower student is cut: all layers to the same channels, each layer to its own most important heads and neurons
  (Muralidharan et al. 2024, 2407.14679); scales of norms are corrected for the channels that are gone
  (`norm_correction`). A wider MLP adds fresh neurons whose outputs start at zero. Linear mixers start from projections
  of attention (`mixers`), experts from the neurons of a dense MLP (`mlps`). Multipliers of the teacher's configuration
  (on embeddings, scores, residuals, logits) that the student lacks are folded into its parameters, so that it computes
  the same (`multipliers`). Parts that do not fit stay fresh, which means random: a mixer with another head width or of
  a type without a conversion, an MLP of another form, and experts of another number or width.

  Args:
    fresh: Freshly initialised canonical parameters of the student.
    config: The student's architecture.
    teacher: The teacher's canonical parameters, adapters merged.
    teacher_config: The teacher's architecture.
    layers: Index of the teacher layer that each student layer starts from, or 'importance': the layers that change
      their input most, in ascending order.
    importance: Importance of the teacher's parts; required if `needs_importance`.

  Raises:
    InputError: `layers` does not name one teacher layer for each student layer, the student is wider than its teacher,
      or the student's one tied table cannot be both the teacher's embedding and its head.
  """
  chosen = choose_layers(layers, config=config, teacher=teacher_config, importance=importance)
  assert importance is not None or not needs_importance(config, teacher=teacher_config, layers=layers)
  ratios = MultiplierRatios.between(teacher_config, config)
  channels = _retained_channels(config, teacher_config, importance)
  source = _Source(
    config=config,
    teacher_config=teacher_config,
    teacher=teacher,
    channels=channels,
    retained=tuple(_retained(*pair, config, teacher_config, importance) for pair in enumerate(chosen)),
    importance=importance,
  )
  taken: Params = {}
  for name in fresh:
    value = source.parameter(name, fresh[name].shape)
    value = None if value is None else ratios.apply(name, value)
    if value is not None and value.shape == fresh[name].shape:
      taken[name] = np.asarray(value, np.float32)
    elif value is not None and (wider := widen(name, value, fresh[name])) is not None:
      taken[name] = wider
  return InitialStudent(params={**fresh, **taken}, taken=tuple(taken), channels=channels, retained=source.retained)


def choose_layers(
  layers: Sequence[int] | str,
  *,
  config: DecoderConfig,
  teacher: DecoderConfig,
  importance: Importance | None,
  key: str = "student.layers_from",
) -> tuple[int, ...]:
  """Returns the index of the teacher layer that each student layer starts from.

  Args:
    layers: The argument `layers` of `from_teacher`.
    config: The student's architecture.
    teacher: The teacher's architecture.
    importance: Importance of the teacher's parts; required if `layers` is 'importance'.
    key: Name of `layers` in error messages.

  Raises:
    InputError: `layers` does not name one teacher layer for each student layer.
  """
  count, depth = len(config.layers), len(teacher.layers)
  if layers == IMPORTANCE:
    if count > depth:
      raise InputError(
        f"{key}: 'importance' chooses among the teacher's layers, but the student has {count} layers and the teacher "
        f"only {depth}; list teacher layers instead, some of them twice"
      )
    assert importance is not None
    return tuple(map(int, most_important(importance.layers, count)))
  if isinstance(layers, str) or len(layers) != count or not all(0 <= j < depth for j in layers):
    shown = repr(layers) if isinstance(layers, str) else str(tuple(layers))
    raise InputError(
      f"{key}: {shown} must name one of the teacher's layers 0 to {depth - 1} for each of the student's "
      f"{count} layers, or be 'importance'"
    )
  return tuple(layers)


def _retained_channels(config: DecoderConfig, teacher: DecoderConfig, importance: Importance | None) -> Array | None:
  """Returns the teacher's channels that the student's residual stream retains; None for all.

  Raises:
    InputError: The student is wider than its teacher.
  """
  if config.width > teacher.width:
    raise InputError(
      f"student.layers_from: the student's width {config.width} is above the teacher's {teacher.width}; give "
      "the student at most the teacher's width, or leave layers_from out"
    )
  if config.width == teacher.width:
    return None
  assert importance is not None
  return most_important(importance.channels, config.width)


def _retained(
  index: int, layer: int, config: DecoderConfig, teacher: DecoderConfig, importance: Importance | None
) -> RetainedParts:
  """Returns the heads and neurons of teacher layer `layer` that student layer `index` starts from."""
  student, source = config.layers[index], teacher.layers[layer]
  scores, neurons = (None, None) if importance is None else (importance.heads[layer], importance.neurons[layer])
  return RetainedParts(
    layer=layer,
    heads=conversion(student.mixer, source.mixer).heads(student.mixer, source.mixer, scores=scores),
    neurons=choose_neurons(student.mlp, source.mlp, scores=neurons),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source:
  """Makes the student's parameters from the teacher's.

  It does not fold in multipliers such as the embedding scale: `from_teacher` does so afterwards.
  """

  config: DecoderConfig
  teacher_config: DecoderConfig
  teacher: Mapping[str, Any]
  channels: Array | None
  retained: tuple[RetainedParts, ...]
  importance: Importance | None

  def parameter(self, name: str, shape: tuple[int, ...]) -> Array | None:
    """Returns the student's parameter `name` of this shape, made from the teacher; None if it stays fresh."""
    match = re.fullmatch(r"layers\.(\d+)\.(\w+)\.(.*)", name)
    if not match:
      return self._outside_layers(name, shape)
    index, part, inner = int(match[1]), match[2], match[3]
    if part == "mixer":
      return self._mixer(index, inner)
    if part == "mlp":
      return self._mlp(index, inner, shape)
    return self._get(f"layers.{self.retained[index].layer}.{part}.{inner}")

  def _get(self, name: str) -> Array | None:
    """Returns the teacher's parameter `name`, cut to the student's channels; None if the teacher lacks it."""
    if name not in self.teacher:
      return None
    value = cut_channels(name, np.asarray(self.teacher[name], np.float32), self.channels)
    if self.channels is not None and name.endswith("norm.scale") and ".mixer." not in name:
      value = self._corrected(value, name, self.channels)
    return value

  def _corrected(self, scale: Array, name: str, retained: Sequence[int] | Array) -> Array:
    """Returns the scale of the teacher's norm `name`, for a norm over only the inputs with the indices `retained`.

    The effective scale (stored scale + `norm_offset`) is multiplied by the root mean square of these inputs, divided by
    that of all inputs (`norm_correction`). The result is again a stored scale, without the offset.
    """
    assert self.importance is not None
    factor = norm_correction(self.importance.shares[name.removesuffix(".scale")], retained)
    offset = np.float32(self.teacher_config.norm_offset)
    return (scale + offset) * np.float32(factor) - offset

  def _outside_layers(self, name: str, shape: tuple[int, ...]) -> Array | None:
    """Returns the student's parameter `name` outside the layers, made from the teacher's.

    The head of a teacher with tied embeddings is its embedding, transposed. Learned positions are cut to the student's
    number. The result is None if the teacher lacks the parameter, which then keeps its random initialisation.
    """
    if name == "head.kernel" and name not in self.teacher:
      table = self._get("embed.table")
      return None if table is None else table.T
    value = self._get(name)
    return value[: shape[0]] if name == "positions.table" and value is not None else value

  def _mixer(self, index: int, name: str) -> Array | None:
    retained, mixer = self.retained[index], self.config.layers[index].mixer
    source, prefix = self.teacher_config.layers[retained.layer].mixer, f"layers.{retained.layer}.mixer."
    power = mean = None
    if self.importance is not None:
      power, mean = self.importance.power[retained.layer], self.importance.means[retained.layer]
      mean = mean if self.channels is None else mean[self.channels]
    teacher = TeacherMixer(
      config=source,
      norm_offset=self.teacher_config.norm_offset,
      get=lambda name: self._get(prefix + name),
      correct=lambda scale, name, inputs: self._corrected(scale, prefix + name, inputs),
      power=power,
      mean=mean,
    )
    return conversion(mixer, source).parameter(name, mixer=mixer, teacher=teacher, heads=retained.heads)

  def _mlp(self, index: int, name: str, shape: tuple[int, ...]) -> Array | None:
    retained = self.retained[index]
    return convert_mlp(
      name,
      mlp=self.config.layers[index].mlp,
      source=self.teacher_config.layers[retained.layer].mlp,
      neurons=retained.neurons,
      get=lambda name: self._get(f"layers.{retained.layer}.mlp.{name}"),
      shape=shape,
    )
