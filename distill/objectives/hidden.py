"""Loss term: distance between hidden states of student and teacher layers, both models run end to end."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from distill.objectives.pairs import DistanceTerm, Span
from distill.objectives.term import LossInputs, Setting
from distill.tree import Params
from distill.types import Capture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hidden(DistanceTerm):
  """Distance between the projected outputs of student layers and the outputs of their paired teacher layers.

  Each pair has a projector [student D, teacher D], which is trained if the stage's `train` rules match it.
  """

  kind: ClassVar[str] = "hidden"

  def pair(self, student: int, span: Span) -> tuple[int, ...]:
    """Returns (student layer, teacher layer), the default pair of a student layer if `pairs` does not list the pairs.

    The teacher layer is the last of the teacher layers in `span`, which the student layer replaces.
    """
    return student, span.last

  def student_capture(self) -> Capture:
    """Returns a request to capture the outputs of the student layers that the option `pairs` names."""
    return Capture(layers=tuple(i for i, _ in self.listed))

  def teacher_capture(self) -> Capture:
    """Returns a request to capture the outputs of the teacher layers that the option `pairs` names."""
    return Capture(layers=tuple(j for _, j in self.listed))

  def init_params(self, setting: Setting, *, key: Key[Array, ""]) -> Params:
    """Returns a projector for each pair of layers: the identity if the models' widths are equal, else random.

    Random values are Gaussian of variance 1 / (student's width).
    """
    shape = (setting.student.width, setting.teacher_width)

    def projector():
      return jnp.eye(shape[0]) if shape[0] == shape[1] else jax.random.normal(key, shape) * shape[0] ** -0.5

    return {_name(pair): projector() for pair in self.listed}

  def distances(self, inputs: LossInputs) -> Iterator[Float[Array, "B T"]]:
    """Yields, for each pair (student layer, teacher layer), the distance between their outputs at every token."""
    assert inputs.output is not None and inputs.signal is not None
    for i, j in self.listed:
      student = projected(inputs.output.layers[i], inputs.params.get(_name((i, j))))
      yield self.measure(student, jax.lax.stop_gradient(inputs.signal.layers[j]))


def _name(pair: tuple[int, ...]) -> str:
  return f"{pair[0]}_{pair[1]}.kernel"


def projected(x: Float[Array, "B T D"], kernel: Float[Array, "D O"] | None) -> Float[Array, "B T O"]:
  """Returns x @ kernel, or x unchanged if `kernel` is None."""
  if kernel is None:
    return x
  return jnp.matmul(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1)
