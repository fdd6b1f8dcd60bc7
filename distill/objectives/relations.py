"""Loss term: MiniLMv2 self-attention relations (2012.15828), for models of any widths."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from distill.configuration import option
from distill.errors import InputError
from distill.losses.layer_distances import relation_kl
from distill.objectives.pairs import PairTerm, Span
from distill.objectives.term import LossInputs, Setting
from distill.types import Capture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relations(PairTerm):
  """KL between the self-attention relations of paired layers, averaged over those of queries, keys and values.

  The relations of queries are a softmax over the products between positions' queries, and likewise for keys and values
  (`relation_kl`). Their shape does not depend on the width, so the widths of the models may differ.
  """

  kind: ClassVar[str] = "relations"

  heads: int = option(8, least=1, help="Relation heads that queries, keys and values of both models are cut into.")

  def bind(self, setting: Setting, *, key: str) -> PairTerm:
    """Checks the options, and returns the term with its list of (student layer, teacher layer) pairs.

    By default the pairs follow from `setting.layers_from`. If that is None, because the layers are not chosen yet, the
    term is returned without pairs.

    Raises:
      InputError: An option does not fit the stage, or `heads` does not divide the known widths of the queries, keys and
        values of a layer in a pair.
    """
    bound = super().bind(setting, key=key)
    for pair in bound.listed:
      for model, config, layer in zip(("student", "teacher"), (setting.student, setting.teacher), pair, strict=True):
        widths = config.layers[layer].mixer.qkv_widths if config else ()
        if any(width % self.heads for width in widths):
          raise InputError(
            f"{key}.heads: {self.heads} relation heads do not divide the {model}'s queries, keys and values in layer "
            f"{layer}, whose widths are {', '.join(map(str, widths))}; give a number that divides all of them"
          )
    return bound

  def pair(self, student: int, span: Span) -> tuple[int, ...]:
    """Returns (student layer, teacher layer), the default pair of a student layer if `pairs` does not list the pairs.

    If `pairs` is empty, the teacher layer is the one that the student layer is initialised from. If `pairs` is
    'uniform', it is the first of the teacher layers in `span`, which the student layer replaces.
    """
    return student, span.source

  def student_capture(self) -> Capture:
    """Returns a request to capture the queries, keys and values of the student layers that the option `pairs` names."""
    return Capture(qkv=tuple(i for i, _ in self.listed))

  def teacher_capture(self) -> Capture:
    """Returns a request to capture the queries, keys and values of the teacher layers that the option `pairs` names."""
    return Capture(qkv=tuple(j for _, j in self.listed))

  def distances(self, inputs: LossInputs) -> Iterator[Float[Array, "B T"]]:
    """Yields, for each pair (student layer, teacher layer), the KL divergence of their relations at every token.

    The divergence is the mean over those of queries, keys and values; `relation_kl` defines relations.
    """
    assert inputs.output is not None and inputs.signal is not None
    for i, j in self.listed:
      total = jnp.zeros(inputs.batch.segments.shape, jnp.float32)
      for student, teacher in zip(inputs.output.qkv[i], inputs.signal.qkv[j], strict=True):
        total = total + relation_kl(
          student, jax.lax.stop_gradient(teacher), segments=inputs.batch.segments, heads=self.heads
        )
      yield total / 3
