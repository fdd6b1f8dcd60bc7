"""Finds the sections of a teacher cache that a run reads in place of a live teacher.

A section holds the teacher's signal for the rows of one token store (`distill/teachers/sections.py`).
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from distill.errors import InputError
from distill.teachers.cached import CachedTeacher
from distill.teachers.sections import MANIFEST, find_section, open_sections
from distill.types import Capture, SparseSignal


class CacheIndex:
  """Finds the cache section of each token store that the run reads, and checks that all sections are of one teacher.

  Args:
    directory: Directory of the teacher cache.
    subjects: Name of each stage with a teacher -> one mapping for each token store of the stage. The mapping says what
      the store's section must have been made for; it is the argument `subject` of `find_section`.
    settings: Key of the manifests -> (key of the recipe, value in the recipe); all manifests must have this value.

  Attributes:
    teacher: The `CachedTeacher` that the run uses in place of a live teacher.
    targets: Kind, size and temperature of the cached sparse targets.

  Raises:
    InputError: No stage needs a teacher, or the cache lacks rows, is damaged, has other settings, or was made from
      another teacher, tokenizer or text.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    *,
    subjects: Mapping[str, Sequence[Mapping[str, Any]]],
    settings: Mapping[str, tuple[str, Any]],
  ):
    sections = open_sections(directory)
    self._sections = {
      stage: [find_section(sections, one, what=f"config.data.sources[{i}]") for i, one in enumerate(stores)]
      for stage, stores in subjects.items()
    }
    used = {section.identity: section for one in self._sections.values() for section in one}
    if not used:
      raise InputError("config.teacher.cache: no term of any stage needs a teacher; leave this key out")
    first = next(iter(used.values()))
    for section in used.values():
      manifest_path = section.directory / MANIFEST
      for key in ("teacher", "width", "depth", "vocab_size"):
        if section.manifest[key] != first.manifest[key]:
          raise InputError(
            f"{manifest_path}: {key} is {section.manifest[key]!r}, but {first.manifest[key]!r} in another section of "
            "the teacher cache; set config.teacher.model to choose one teacher"
          )
      for key, (recipe_key, value) in settings.items():
        if (found := section.manifest[key]) != value:
          raise InputError(
            f"{manifest_path}: the cache was made with {recipe_key} {found!r}, but config.{recipe_key} is {value!r}; "
            "set the value of the cache, or make another cache"
          )
    self.targets = first.format.targets
    self.teacher = CachedTeacher(
      identity=hashlib.sha256(json.dumps(sorted(used)).encode()).hexdigest(),
      **{key: first.manifest[key] for key in ("width", "depth", "vocab_size")},
    )

  def readers(self, stage: str, capture: Capture, *, key: str) -> list[Callable[[Int[np.ndarray, " B"]], SparseSignal]]:
    """Returns, for each token store of a stage, a function from row indices [B] to the cached signal of these rows.

    Args:
      stage: Name of a stage with a teacher.
      capture: Teacher activations that the stage's terms need.
      key: Key of the terms in the recipe; error messages begin with it.

    Raises:
      InputError: A section does not hold the activations in `capture`.
    """
    if capture.qkv:
      raise InputError(
        f"{key}: a teacher cache holds no queries, keys and values; leave out the terms that compare them, or "
        "leave out config.teacher.cache to run the teacher itself"
      )
    for section in self._sections[stage]:
      for kind, asked in (("layers", capture.layers), ("mixers", capture.mixers)):
        if missing := sorted(set(asked) - set(section.manifest[kind])):
          raise InputError(
            f"{key}: these terms need the outputs of the teacher's {kind} {missing}, which {section.directory} does "
            f"not hold; run distill cache with --config.teacher_cache.{kind} naming all of {list(asked)}, into another "
            "--workdir"
          )
    return [functools.partial(section.read, capture=capture) for section in self._sections[stage]]
