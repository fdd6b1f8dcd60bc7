"""Folds the multipliers of a teacher's configuration (such as embedding scale) into the student's parameters."""

import dataclasses
import re

import numpy as np

from distill.errors import InputError
from distill.models.config import DecoderConfig

Array = np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiplierRatios:
  """Ratios of the teacher's multipliers to the student's, and the norm offsets of both.

  Attributes:
    embedding: Ratio of the multipliers of the embeddings.
    logits: Ratio of the multipliers of the logits.
    residual: Ratio of the multipliers of each mixer's and MLP's output before it is added to the residual stream.
    final: Factor of the final norm's scale. It is logits / embedding if the student's embedding and head are tied, so
      that one table cannot hold both ratios; else 1.
    offsets: What each model's norms add to their stored scale, (teacher, student); None if the two models use
      different kinds of norm.
  """

  embedding: float
  logits: float
  residual: float
  final: float
  offsets: tuple[float, float] | None

  @classmethod
  def between(cls, teacher: DecoderConfig, student: DecoderConfig) -> "MultiplierRatios":
    """Returns the ratios of the teacher's multipliers to the student's, from the models' configurations.

    Raises:
      InputError: The student ties its embedding to its head, but the embedding's ratio differs from the head's. The
        final norm could make up for that only if both models had the same kind of norm, and they have not.
    """
    embedding, logits = teacher.embed_scale / student.embed_scale, teacher.logit_scale / student.logit_scale
    uneven = student.tie_embeddings and not np.isclose(embedding, logits)
    if uneven and teacher.norm != student.norm:
      raise InputError(
        f"student.layers_from: the teacher scales its embeddings {embedding:g} times as much as the student, but its "
        f"logits {logits:g} times, and one tied table cannot hold both; set tie_word_embeddings to false in "
        "student.config"
      )
    return cls(
      embedding=embedding,
      logits=logits,
      residual=teacher.residual_scale / student.residual_scale,
      final=logits / embedding if uneven else 1.0,
      offsets=(teacher.norm_offset, student.norm_offset) if teacher.norm == student.norm else None,
    )

  def apply(self, name: str, value: Array) -> Array | None:
    """Returns the teacher's parameter `name`, rescaled for the student.

    The result is None for a parameter of a norm outside the mixers if the two models use different kinds of norm.
    """
    if name.endswith(("norm.scale", "norm.bias")) and ".mixer." not in name and self.offsets is None:
      return None
    if name == "norm.bias":
      return value * np.float32(self.final)
    if name.endswith("norm.scale") and ".mixer.norm" not in name and self.offsets is not None:
      factor = np.float32(self.final if name == "norm.scale" else 1.0)
      return (value + np.float32(self.offsets[0])) * factor - np.float32(self.offsets[1])
    if re.search(r"\.(mixer\.o|mlp\.down|mlp\.(experts|shared)\.down)\.(kernel|bias)$", name):
      return value * np.float32(self.residual)
    factors = {"embed.table": self.embedding, "head.kernel": self.logits}
    return value * np.float32(factors.get(name, 1.0))
