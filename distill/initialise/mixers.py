"""Initialises a student's mixer from a teacher's: copies projections, and regroups them for the student's heads."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from distill.initialise.pruning import Heads, choose_heads, pick
from distill.nn.attention import AttentionConfig
from distill.nn.gated_delta import GatedDeltaConfig
from distill.nn.mamba2 import Mamba2Config
from distill.nn.mixer import MixerConfig

Array = np.ndarray
_OPEN = 1.278  # silu of it is one.


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherMixer:
  """One mixer of the teacher: its configuration, parameters and measured activations, for a `Conversion` to read.

  Attributes:
    config: Configuration of the mixer.
    norm_offset: Offset that the mixer's norms add to their stored scales.
    get: Returns a parameter by its name within the mixer, cut to the student's channels; None if there is none.
    correct: correct(scale, name, inputs) rescales the teacher's norm `name` for a student whose norm has only the
      inputs with the indices `inputs`. It multiplies scale + `norm_offset` by `pruning.norm_correction`, which makes up
      for the changed root mean square, and subtracts the offset again.
    power: Mean square of each head's output [N]; None where importance was not measured.
    mean: Mean input of the mixer, cut to the student's channels [D]; None where importance was not measured.
  """

  config: Any
  norm_offset: float
  get: Callable[[str], Array | None]
  correct: Callable[[Array, str, list[int]], Array]
  power: Float[Array, " N"] | None
  mean: Float[Array, " D"] | None


@runtime_checkable
class Conversion(Protocol):
  """Converts the parameters of one type of teacher mixer to those of one type of student mixer."""

  def heads(self, mixer: Any, source: Any, *, scores: Array | None) -> Heads | None:
    """Returns the teacher's heads that the student's mixer starts from, or None if no heads are chosen.

    Args:
      mixer: Configuration of the student's mixer.
      source: Configuration of the teacher's mixer.
      scores: Importance of the teacher's query heads [N]; None where it was not measured.
    """

  def needs_importance(self, mixer: Any, source: Any) -> bool:
    """Returns True if this conversion reads the teacher's importance, which must then be measured first."""

  def parameter(self, name: str, *, mixer: Any, teacher: TeacherMixer, heads: Heads | None) -> Array | None:
    """Returns the student mixer's parameter `name`, or None if this parameter keeps its random initialisation.

    Args:
      name: Name of the parameter within the mixer.
      mixer: Configuration of the student's mixer.
      teacher: The teacher's mixer.
      heads: The heads that the method `heads` returned.
    """

  def describe(self, mixer: Any, source: Any, *, heads: Heads | None) -> str:
    """Returns a few words for the summary table: which of the student mixer's parameters come from the teacher."""


class Copied:
  """Conversion between equal mixers of any type: copies every parameter."""

  def heads(self, mixer: MixerConfig, source: MixerConfig, *, scores: Array | None) -> None:
    """Returns None, as no heads are chosen: the mixer is copied with all its heads."""

  def needs_importance(self, mixer: MixerConfig, source: MixerConfig) -> bool:
    """Returns False: the conversion reads no measured importance of the teacher's parts."""
    return False

  def parameter(self, name: str, *, mixer: Any, teacher: TeacherMixer, heads: Heads | None) -> Array | None:
    """Returns the teacher's parameter `name`, cut to the student's channels; None if the teacher lacks it.

    `mixer` and `heads` are ignored: both mixers are equal, so all heads are copied unchanged.
    """
    return teacher.get(name)

  def describe(self, mixer: MixerConfig, source: MixerConfig, *, heads: Heads | None) -> str:
    """Returns 'copied' for the summary table: every parameter comes from the teacher."""
    return "copied"


class Fresh:
  """Conversion between mixers that share no parameters: every student parameter keeps its random initialisation."""

  def heads(self, mixer: MixerConfig, source: MixerConfig, *, scores: Array | None) -> None:
    """Returns None: the student's mixer starts from none of the teacher's heads."""

  def needs_importance(self, mixer: MixerConfig, source: MixerConfig) -> bool:
    """Returns False: the conversion reads no measured importance of the teacher's parts."""
    return False

  def parameter(self, name: str, *, mixer: Any, teacher: TeacherMixer, heads: Heads | None) -> None:
    """Returns None: every parameter keeps its random initialisation."""

  def describe(self, mixer: MixerConfig, source: MixerConfig, *, heads: Heads | None) -> str:
    """Returns, for the summary table, why the mixer stays random, with the type of the teacher's mixer."""
    same = mixer.kind == source.kind
    return f"fresh: the teacher's {source.kind} {'is configured otherwise' if same else 'does not convert'}"


class FromAttention:
  """Base class of conversions whose teacher mixer is attention: chooses the attention heads to start from."""

  def heads(self, mixer: MixerConfig, source: AttentionConfig, *, scores: Array | None) -> Heads | None:
    """Returns the teacher's most important heads, or None if the student's heads cannot be made from the teacher's.

    They cannot if the head widths differ, if the teacher has too few heads, or if the student has more query heads for
    each key head than the teacher, but not a multiple of the teacher's number.
    """
    shape = mixer.head_shape
    assert shape is not None
    if shape.key_width != source.head_dim or shape.value_width != source.head_dim:
      return None
    scores = np.zeros(source.num_heads) if scores is None else scores
    return choose_heads(scores, keys=source.num_kv_heads, retained=shape.heads, retained_keys=shape.key_heads)

  def describe(self, mixer: MixerConfig, source: AttentionConfig, *, heads: Heads | None) -> str:
    """Returns the entry of the summary table: which parameters are converted, and which head counts differ.

    If `heads` is None, nothing is converted, and the entry says why.
    """
    shape = mixer.head_shape
    assert shape is not None
    if heads is None:
      other = next((size for size in (shape.key_width, shape.value_width) if size != source.head_dim), None)
      why = f"{shape.heads} heads over {shape.key_heads} key heads" if other is None else f"heads of {other}"
      return f"fresh: {why}, the teacher has {source.num_heads} of {source.head_dim}"
    counts = ((shape.heads, source.num_heads, "heads"), (shape.key_heads, source.num_kv_heads, "key heads"))
    return self._converted(", ".join(f"{mine} of {theirs} {what}" for mine, theirs, what in counts if mine != theirs))

  def _converted(self, changed: str) -> str:
    raise NotImplementedError


class Regrouped(FromAttention):
  """Conversion from attention to attention with other head counts, another score scale, or other gates."""

  def needs_importance(self, mixer: AttentionConfig, source: AttentionConfig) -> bool:
    """Returns True if the student removes heads, or if it adds heads and the teacher's `qk_norm` is 'full'.

    Heads are query heads or key heads. Importance decides which heads are retained. A norm across all heads (`qk_norm`
    'full') divides by a root mean square (RMS) that changes with the heads. Its scale is therefore multiplied by
    RMS of the student's heads / RMS of all heads, which importance measures in the teacher.
    """
    heads, keys = mixer.num_heads, mixer.num_kv_heads
    same = (heads, keys) == (source.num_heads, source.num_kv_heads)
    return not same and (source.qk_norm == "full" or heads < source.num_heads or keys < source.num_kv_heads)

  def parameter(self, name: str, *, mixer: AttentionConfig, teacher: TeacherMixer, heads: Heads | None) -> Array | None:
    """Returns the student's parameter `name`, made from the teacher's; None if it keeps its random initialisation.

    Only the parts that belong to the heads in `heads` are taken. They are rescaled so that each head computes the same
    scores and outputs as in the teacher. The parameter stays random if `heads` is None or the teacher lacks it.
    """
    value = None if heads is None else _regrouped(name, teacher, heads)
    if value is None or heads is None:
      return None
    value = _attention(name, value, mixer=mixer, source=teacher.config, norm_offset=teacher.norm_offset)
    if teacher.config.qk_norm == "full" and name in ("q_norm.scale", "k_norm.scale"):
      return _full_norm(value, name, teacher, heads)
    return value

  def _converted(self, changed: str) -> str:
    return f"regrouped: {changed}" if changed else "copied"


@dataclasses.dataclass(frozen=True)
class Linear(FromAttention):
  """Conversion from attention to a linear mixer (Mamba-2 or gated delta rule).

  Queries, keys, values and the output projection are the teacher's (RADLADS, 2505.03005). Convolutions start as the
  identity. The mixer norms its outputs, which attention does not. The rows of the output projection are therefore
  multiplied by the measured root mean square of their attention head's output. The kernel of the output gate is made
  from the measured mean input of attention, so that the gate is about one at this input. A gate near zero, or of random
  sign, would hide the copied projections. Decays keep their random initialisation, which gives the heads memories from
  one position to thousands of positions. In measurements this came nearer to the teacher than slow decays alone.

  Attributes:
    kernels: For each kernel of the mixer, the attention kernel (q, k or v) that it starts from.
  """

  kernels: Mapping[str, str]

  def needs_importance(self, mixer: MixerConfig, source: AttentionConfig) -> bool:
    """Returns True: the conversion reads `power` and `mean` of `TeacherMixer`, which are measured activations."""
    return True

  def parameter(self, name: str, *, mixer: Any, teacher: TeacherMixer, heads: Heads | None) -> Array | None:
    """Returns the student's parameter `name`, or None if this parameter keeps its random initialisation.

    Kernels of queries, keys, values and the output come from the teacher's attention, the kernel of the output gate
    from the mean input of this attention, and kernels of convolutions are the identity. Every other parameter stays
    random; all do if `heads` is None.
    """
    if heads is None:
      return None
    size, mean = teacher.config.head_dim, teacher.mean
    assert teacher.power is not None and mean is not None
    if name == "o.kernel":
      value = _regrouped(name, teacher, heads)
      assert value is not None
      scale = np.sqrt(teacher.power[list(heads.queries)])
      return value * np.repeat(scale, size)[:, None].astype(np.float32)
    if name == "z.kernel":
      return np.outer(_OPEN * mean / np.dot(mean, mean), np.ones(len(heads.queries) * size)).astype(np.float32)
    *inside, projection, kind = name.split(".") if "." in name else ("", name)
    if kind != "kernel" or projection not in self.kernels:
      return None
    kernel = _linear_kernel(self.kernels[projection], teacher, heads)
    return _last_tap(mixer.conv_width, kernel.shape[1]) if inside else kernel

  def _converted(self, changed: str) -> str:
    return "q, k, v, o of attention" + (f", {changed}" if changed else "")


# By the types of the teacher's mixer and the student's.
CONVERSIONS: Mapping[tuple[type, type], Conversion] = {
  (AttentionConfig, AttentionConfig): Regrouped(),
  (AttentionConfig, GatedDeltaConfig): Linear({"q": "q", "k": "k", "v": "v"}),
  (AttentionConfig, Mamba2Config): Linear({"c": "q", "b": "k", "x": "v"}),
}


def conversion(mixer: MixerConfig, source: MixerConfig) -> Conversion:
  """Returns the conversion from the teacher's mixer `source` to the student's `mixer`.

  The table `CONVERSIONS` lists it by the types of both mixers. Types that are not in the table get `Copied` if the
  mixers are equal, else `Fresh`.
  """
  return CONVERSIONS.get((type(source), type(mixer))) or (Copied() if mixer == source else Fresh())


def _last_tap(width: int, channels: int) -> Array:
  """Returns a convolution kernel [width, channels] that is the identity: one at the last tap, zero elsewhere."""
  return np.eye(width, dtype=np.float32)[-1:].T.repeat(channels, axis=1)


def _regrouped(name: str, teacher: TeacherMixer, heads: Heads) -> Array | None:
  """Returns a parameter of the teacher's attention, regrouped to the student's heads; None if the teacher lacks it."""
  source, value, (projection, *_) = teacher.config, teacher.get(name), name.split(".")
  if value is None or name == "o.bias":
    return value
  if projection.endswith("_norm") and source.qk_norm != "full":
    return value
  if projection in ("k", "v", "k_norm"):
    return pick(value, heads.keys, axis=-1, units=source.num_kv_heads)
  return pick(value, heads.queries, axis=0 if projection == "o" else -1, units=source.num_heads)


def _scale(config: AttentionConfig) -> float:
  return config.head_dim**-0.5 if config.scale is None else config.scale


def _attention(
  name: str, value: Array, *, mixer: AttentionConfig, source: AttentionConfig, norm_offset: float
) -> Array:
  """Returns an attention parameter, rescaled for the student's score scale and output gate.

  Scores keep the teacher's values. A gate that only the student has passes half of its input at first, so the output
  projection `o` is doubled; it is halved if only the teacher has a gate.
  """
  scores, size = np.float32(_scale(source) / _scale(mixer)), source.head_dim
  if name == "q_norm.scale":
    return (value + np.float32(norm_offset)) * scores - np.float32(norm_offset)
  if name in ("q.kernel", "q.bias"):
    parts = value.reshape(*value.shape[:-1], mixer.num_heads, -1)
    queries, gates = parts[..., :size], parts[..., size:]
    queries = queries if mixer.qk_norm else queries * scores
    if mixer.gated:
      gates = gates if source.gated else np.zeros_like(queries)
      queries = np.concatenate([queries, gates], axis=-1)
    return queries.reshape(*value.shape[:-1], -1)
  if name == "o.kernel" and mixer.gated != source.gated:
    return value * np.float32(2.0 if mixer.gated else 0.5)
  return value


def _full_norm(scale: Array, name: str, teacher: TeacherMixer, heads: Heads) -> Array:
  """Returns the scale of a norm over all heads of queries or keys, rescaled if the student has other heads.

  The norm divides by the root mean square of its inputs, which differs if heads are added or removed. The scale is
  multiplied by the ratio of the student's root mean square to the teacher's (`TeacherMixer.correct`).
  """
  source, queries = teacher.config, name == "q_norm.scale"
  count = source.num_heads if queries else source.num_kv_heads
  chosen = [(head,) for head in heads.queries] if queries else list(heads.keys)
  if chosen == [(head,) for head in range(count)]:
    return scale
  size = source.head_dim
  return teacher.correct(scale, name, [head * size + i for one in chosen for head in one[:1] for i in range(size)])


def _linear_kernel(name: str, teacher: TeacherMixer, heads: Heads) -> Array:
  """Returns the teacher's attention kernel `name` ('q', 'k' or 'v'), regrouped for the heads of a linear mixer.

  For 'q' and 'k' the result has one head for each key head of the student; for 'v', one for each value head. `heads`
  assigns one or more teacher query heads to each student key head; the student's query head is the mean of these.
  """
  source, value = teacher.config, teacher.get(f"{name}.kernel")
  assert value is not None, name
  if name == "k":
    return pick(value, heads.keys, axis=-1, units=source.num_kv_heads)
  group = len(heads.queries) // len(heads.keys)
  if name == "v":
    return pick(value, [heads.keys[i // group] for i in range(len(heads.queries))], axis=-1, units=source.num_kv_heads)
  if source.gated:
    parts = value.reshape(value.shape[0], source.num_heads, -1)[..., : source.head_dim]
    value = parts.reshape(value.shape[0], -1)
  grouped = [heads.queries[i : i + group] for i in range(0, len(heads.queries), group)]
  return pick(value, grouped, axis=-1, units=source.num_heads)
