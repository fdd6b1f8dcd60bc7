"""Stages of a run: their places among its steps, their terms, and what trains beside the student."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distill.errors import InputError
from distill.jobs.models import Models
from distill.objectives.terms import RELATIONS, Term, build_terms, demands, needs_teacher, projector_shapes
from distill.parallel.mesh import replicated
from distill.training.config import StageConfig
from distill.tree import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """A stage of a run: its place among all steps, its terms, and how parameters train."""

  name: str
  first: int
  steps: int
  terms: tuple[Term, ...]
  config: StageConfig


def read_stages(configs: Sequence[StageConfig], models: Models) -> tuple[Stage, ...]:
  """Returns the stages of a run, in order.

  Raises:
    InputError: Terms that are wrong, or that these models have nothing for.
  """
  stages: list[Stage] = []
  student, teacher = models.student.config, models.teacher
  for config in configs:
    name = config.name
    first = stages[-1].first + stages[-1].steps if stages else 0
    terms = build_terms(
      config.terms,
      key=f"config.stages.{name}.terms",
      steps=config.steps,
      layers_from=models.layers_from,
      depths=(len(student.layers), teacher.depth if teacher else len(student.layers)),
    )
    if needs_teacher(terms) and teacher is None:
      raise InputError(f"config.stages.{name}.terms: they need a teacher; set config.teacher.model")
    wanted = demands(terms)
    if wanted.mixture and not any(layer.mlp is not None and layer.mlp.routed for layer in student.layers):
      raise InputError(f"config.stages.{name}.terms: balance is of mixtures of experts, and the student has none")
    if (wanted.mixers or wanted.blocks) and teacher and student.width != teacher.width:
      raise InputError(
        f"config.stages.{name}.terms: mixer_output and block_output give the student's layers (width {student.width}) "
        f"the teacher's inputs (width {teacher.width}); the widths must agree"
      )
    for index, term in enumerate(terms):
      for i, j in term.pairs if term.kind == RELATIONS else ():
        _check_heads(term.heads, models, (i, j), key=f"config.stages.{name}.terms[{index}].heads")
    stages.append(Stage(name=name, first=first, steps=config.steps, terms=terms, config=config))
  return tuple(stages)


def _check_heads(heads: int, models: Models, pair: tuple[int, int], *, key: str) -> None:
  theirs = models.teacher.config if models.teacher else None
  for whose, config, layer in (("student", models.student.config, pair[0]), ("teacher", theirs, pair[1])):
    widths = config.layers[layer].mixer.qkv_widths if config else ()
    if bad := [width for width in widths if width % heads]:
      raise InputError(
        f"{key}: {heads} relation heads do not divide the {whose}'s queries, keys and values in layer {layer}, "
        f"{', '.join(map(str, widths))} wide ({bad[0]} is no multiple)"
      )


def projectors(stages: Sequence[Stage], *, models: Models, seed: int, mesh: Mesh) -> Params:
  """A trained map from each compared student layer to the teacher's width: the identity where the widths agree."""
  if models.teacher is None:
    return {}
  widths = models.student.config.width, models.teacher.width
  found: Params = {}
  for stage in stages:
    for name, shape in projector_shapes(stage.terms, student_width=widths[0], teacher_width=widths[1]).items():
      key = jax.random.fold_in(jax.random.key(seed), 2)
      square = shape[0] == shape[1]
      value = jnp.eye(shape[0]) if square else jax.random.normal(key, shape) * shape[0] ** -0.5
      found[f"projectors.{name}"] = jax.device_put(value, replicated(mesh))
  return found
