"""Finds the sections of a teacher cache that a run reads in place of a live teacher."""

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
  """Finds the section of every token store that stages with a teacher read, and checks that they fit together.

  Args:
    directory: The teacher cache.
    subjects: Name of each stage with a teacher -> for each of its stores, the values that the manifest of the section
      must have for keys of `sections.SUBJECT`.
    settings: Key of a manifest -> (key of the recipe, the value it must have).

  Attributes:
    teacher: The cached teacher, which replaces a live one.
    targets: Kind of the sparse targets in all sections.

  Raises:
    InputError: The cache lacks some rows, is damaged, or belongs to another teacher, tokenizer or text.
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
      where = section.directory / MANIFEST
      for key in ("teacher", "width", "depth", "vocab_size"):
        if section.manifest[key] != first.manifest[key]:
          raise InputError(
            f"{where}: {key} is {section.manifest[key]!r}, but {first.manifest[key]!r} in another section of the "
            "cache; set config.teacher.model to choose one teacher"
          )
      for key, (recipe_key, value) in settings.items():
        if (found := section.manifest[key]) != value:
          raise InputError(
            f"{where}: made with {recipe_key} {found!r}, config.{recipe_key} is {value!r}; make them agree"
          )
    self.targets = first.format.targets
    self.teacher = CachedTeacher(
      identity=hashlib.sha256(json.dumps(sorted(used)).encode()).hexdigest(),
      **{key: first.manifest[key] for key in ("width", "depth", "vocab_size")},
    )

  def readers(self, stage: str, capture: Capture, *, key: str) -> list[Callable[[Int[np.ndarray, " B"]], SparseSignal]]:
    """Returns, for each store of a stage, a function from row indices [B] to the cached signal of these rows.

    Args:
      stage: Name of a stage with a teacher.
      capture: Activations that its terms need.
      key: Where the terms stand in the recipe, for messages.

    Raises:
      InputError: A section does not hold the activations.
    """
    if capture.qkv:
      raise InputError(
        f"{key}: a cache holds no queries, keys and values; leave out the terms that compare them, or "
        "config.teacher.cache"
      )
    for section in self._sections[stage]:
      for name, asked in (("layers", capture.layers), ("mixers", capture.mixers)):
        if lacks := sorted(set(asked) - set(section.manifest[name])):
          raise InputError(
            f"{key}: its terms need the teacher's {name} {lacks}, which {section.directory} lacks; run distill cache "
            f"with --config.teacher_cache.{name} naming all of {list(asked)} into another --workdir"
          )
    return [functools.partial(section.read, capture=capture) for section in self._sections[stage]]
