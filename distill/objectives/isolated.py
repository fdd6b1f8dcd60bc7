"""Loss terms that run student layers on the teacher's inputs and compare their outputs with the teacher's.

Each student layer then learns its part of the teacher without the errors of the student layers below it. The first
stages of a conversion use these terms.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
from jaxtyping import Array, Float

from distill.errors import InputError
from distill.models.layer import Layer
from distill.objectives.pairs import DistanceTerm, PairTerm, Span
from distill.objectives.term import LossInputs, Setting
from distill.types import Capture, before


@dataclasses.dataclass(frozen=True, kw_only=True)
class _IsolatedTerm(DistanceTerm):
  """Base class of terms that run each student layer on the input of its paired teacher layer."""

  runs_student: ClassVar[bool] = False

  def bind(self, setting: Setting, *, key: str) -> PairTerm:
    """Returns the term with its (student layer, teacher layer) pairs listed; checks them and the other options.

    By default the pairs follow from `setting.layers_from`; while this is None, the term is returned without pairs.

    Raises:
      InputError: An option does not fit the stage, or the models have different widths, so that student layers cannot
        run on the teacher's inputs.
    """
    if setting.student.width != setting.teacher_width:
      raise InputError(
        f"{key}: {self.kind} runs the student's layers (width {setting.student.width}) on the teacher's inputs (width "
        f"{setting.teacher_width}), which needs equal widths; use a student of the teacher's width, or the term hidden"
      )
    return super().bind(setting, key=key)

  def run(self, inputs: LossInputs, method: Callable[..., Any]) -> dict[tuple[int, int], Float[Array, "B T D"]]:
    """Runs the student layer of each entry of `pairs` on the input of the first teacher layer that the entry names.

    Stacked layers run in one scan.

    Args:
      inputs: The micro-batch, with the teacher's recorded activations.
      method: The method of `Layer` to run: `Layer.mix`, or `Layer.__call__` for the whole layer.

    Returns:
      (student layer, teacher layer whose input it ran on) -> output of the student layer [B,T,D].
    """
    assert inputs.signal is not None and inputs.run_isolated is not None
    pairs = sorted({(pair[0], pair[1]) for pair in self.listed})
    given = [jax.lax.stop_gradient(inputs.signal.layers[before(j)]) for _, j in pairs]
    outputs = inputs.run_isolated(method, inputs=given, layers=[i for i, _ in pairs])
    return dict(zip(pairs, outputs, strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerOutput(_IsolatedTerm):
  """Distance between the mixer outputs of a student and a teacher layer, both run on the teacher's input."""

  kind: ClassVar[str] = "mixer_output"

  def pair(self, student: int, span: Span) -> tuple[int, ...]:
    """Returns (student layer, teacher layer), the default pair of a student layer if `pairs` does not list the pairs.

    If `pairs` is empty, the teacher layer is the one that the student layer is initialised from. If `pairs` is
    'uniform', it is the first of the teacher layers in `span`, which the student layer replaces.
    """
    return student, span.source

  def teacher_capture(self) -> Capture:
    """Returns a request to capture the inputs and the mixer outputs of the teacher layers that `pairs` names."""
    layers = tuple(j for _, j in self.listed)
    return Capture(layers=tuple(map(before, layers)), mixers=layers)

  def distances(self, inputs: LossInputs) -> Iterator[Float[Array, "B T"]]:
    """Yields, for each pair (student layer, teacher layer), the distance between their mixer outputs at every token."""
    assert inputs.signal is not None
    outputs = self.run(inputs, Layer.mix)
    for i, j in self.listed:
      yield self.measure(outputs[i, j], jax.lax.stop_gradient(inputs.signal.mixers[j]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockOutput(_IsolatedTerm):
  """Distance between the outputs of a student layer and of teacher layers, both run on the teacher's input.

  A pair (student, first, last) compares one student layer with the teacher layers `first` to `last` together; a pair
  (student, teacher) compares it with one teacher layer, which is both first and last.
  """

  kind: ClassVar[str] = "block_output"
  spans: ClassVar[bool] = True

  def pair(self, student: int, span: Span) -> tuple[int, ...]:
    """Returns (student layer, first teacher layer, last teacher layer), the default if `pairs` does not list the pairs.

    The two teacher layers are the ends of `span`, the teacher layers that the student layer replaces.
    """
    return student, span.first, span.last

  def teacher_capture(self) -> Capture:
    """Returns a request to capture the input of the first and the output of the last teacher layer in each of `pairs`.

    An entry of `pairs` is (student layer, first teacher layer, last teacher layer).
    """
    return Capture(layers=tuple(layer for pair in self.listed for layer in (before(pair[1]), pair[-1])))

  def distances(self, inputs: LossInputs) -> Iterator[Float[Array, "B T"]]:
    """Yields, for each entry of `pairs` in turn, the distance between student and teacher output at every token."""
    assert inputs.signal is not None
    outputs = self.run(inputs, Layer.__call__)
    for pair in self.listed:
      yield self.measure(outputs[pair[0], pair[1]], jax.lax.stop_gradient(inputs.signal.layers[pair[-1]]))
