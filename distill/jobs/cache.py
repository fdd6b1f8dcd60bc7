"""Caches of a run's teacher: made by `distill cache`, found again by a training that has no teacher in memory."""

import functools
import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from distill.adapters import peft
from distill.adapters.stack import StackEntry
from distill.checkpoints import hf_config
from distill.checkpoints.hub import locate
from distill.data.batches import Batches
from distill.data.store import PLACES, TokenStore
from distill.errors import InputError
from distill.files import safetensors_files
from distill.jobs import data
from distill.jobs.config import RunConfig, resolve
from distill.jobs.models import chosen, live_teacher, routes, stack
from distill.models.config import DecoderConfig
from distill.objectives.context import Setting
from distill.objectives.objective import needs_teacher, teacher_capture
from distill.objectives.term import Term
from distill.objectives.terms import bind_terms, read_terms
from distill.parallel.interruption import EXIT_INTERRUPTED, Interruption
from distill.parallel.mesh import make_mesh
from distill.parallel.processes import fail_together, is_writer
from distill.teachers import cache
from distill.teachers.cache import Rows, Section
from distill.teachers.cached import CachedTeacher
from distill.teachers.caching import CacheWriter
from distill.teachers.live import LiveTeacher
from distill.teachers.targets import targets
from distill.training.config import StageConfig
from distill.training.metrics import Progress
from distill.types import INPUT, Capture


def make(recipe: Mapping[str, Any] | RunConfig, *, workdir: pathlib.Path) -> int:
  """Writes, or goes on with, the cache of all rows that stages of `recipe` need a teacher for, in `workdir`.

  Returns:
    0, or `EXIT_INTERRUPTED` after a signal.

  Raises:
    InputError: The configuration, a file it names, or the workdir is wrong.
  """
  config = resolve(recipe)
  mesh = make_mesh(config.training.mesh)
  if config.training.batch_size % (mesh.size // mesh.shape["tensor"]):
    raise InputError("config.training.batch_size: must divide among the data and fsdp devices")
  if not config.teacher.model:
    raise InputError("config.teacher.model: a cache is of a teacher; give a directory")
  if not _taught(config):
    raise InputError("config.stages: no term of any stage looks at a teacher, so there is nothing to cache")
  base = hf_config.read_config(locate(config.teacher.model))
  targets(vars(config.teacher_cache), where="config.teacher_cache", vocab=base.vocab_size)
  states = _states(config, teacher=base)
  tokenizer = data.read_tokenizer(config)
  batches = data.read_batches(config, tokenizer=tokenizer, tokens=workdir / "tokens")
  teacher = live_teacher(config, mesh=mesh)
  sections = _claimed(config, batches, teacher=teacher, states=states, workdir=workdir)
  fillers: dict[Rows, CacheWriter] = {}
  with Interruption() as interruption:
    for number, (section, store, route) in enumerate(sections, start=1):
      if section.rows not in fillers:
        dtype = jnp.dtype(config.training.dtype)
        fillers[section.rows] = CacheWriter(teacher, rows=section.rows, mesh=mesh, dtype=dtype)
      done = store.rows - sum(len(section.bounds(shard)) for shard in section.missing())
      rows = _Progress(f"[{number}/{len(sections)}]", done=done, store=store)
      try:
        whole = fillers[section.rows].fill(
          section, store=store, route=route, stop=interruption.requested, report=rows.report
        )
      finally:
        rows.close()
      if not whole:
        return EXIT_INTERRUPTED
      if is_writer():
        print(_line(section, store), file=sys.stderr, flush=True)
  return 0


def _claimed(
  config: RunConfig,
  batches: Mapping[str, Batches],
  *,
  teacher: LiveTeacher,
  states: Mapping[str, list[int]],
  workdir: pathlib.Path,
) -> list[tuple[Section, TokenStore, int]]:
  """A section for each store of each stage with a teacher, with the route that teaches its rows."""
  subjects = _subjects(config)
  places = routes(config.data.sources)[1]
  found: dict[str, tuple[Section, TokenStore, int]] = {}
  for stage in _taught(config):
    for number, store in enumerate(batches[stage.name].stores):
      manifest = {**_manifest(config, teacher=teacher, store=store), **states, **subjects(number, store)}
      rows = cache.rows_of(manifest, where="config.teacher_cache")
      manifest["shard_rows"] = cache.shard_rows(rows, batch_size=manifest["batch_size"])
      with fail_together("--workdir"):
        section = cache.claim(workdir, manifest)
      found[section.identity] = section, store, places[number]
  return list(found.values())


def _taught(config: RunConfig) -> list[StageConfig]:
  """Returns the stages with a teacher."""
  return [stage for stage in config.stages if needs_teacher(_terms(stage))]


def _terms(stage: StageConfig) -> tuple[Term, ...]:
  return read_terms(stage.terms, key=f"config.stages.{stage.name}.terms")


class _Progress:
  """Progress in rows of one store."""

  def __init__(self, name: str, *, done: int, store: TokenStore):
    self._done, self._length = done, store.length
    self._progress = Progress(name, done=done, total=store.rows, unit="row")
    self.close = self._progress.close

  def report(self, rows: int) -> None:
    """So many more are done."""
    self._done += rows
    self._progress.update(self._done, tokens=rows * self._length)


def _line(section: Section, store: TokenStore) -> str:
  size = sum(path.stat().st_size for path in section.directory.glob("[0-9]*.safetensors"))
  tokens = store.rows * store.length
  return f"{section.directory}: {store.rows:,} rows, {size:,} bytes, {size / max(tokens, 1):.1f} bytes a token"


def _manifest(config: RunConfig, *, teacher: LiveTeacher, store: TokenStore) -> dict[str, Any]:
  """How the teacher is run, and what is kept of its distributions."""
  vocab = teacher.decoder.config.vocab_size
  kept = targets(vars(config.teacher_cache), where="config.teacher_cache", vocab=vocab)
  return {
    "format": cache.FORMAT,
    "rows": store.rows,
    "source": {key: value for key, value in store.meta["source"].items() if key not in PLACES},
    "width": teacher.width,
    "depth": teacher.depth,
    "vocab_size": vocab,
    "dtype": config.training.dtype,
    "teacher_dtype": config.teacher.dtype,
    "batch_size": config.training.batch_size,
    # Nothing else depends on it.
    "seed": config.seed if config.teacher_cache.targets == "sampled" else 0,
    "targets": config.teacher_cache.targets,
    "size": kept.size,
    "temperature": kept.temperature,
  }


def _states(config: RunConfig, *, teacher: DecoderConfig) -> dict[str, list[int]]:
  """Returns the layers and mixers that config.teacher_cache names or a term needs with the run's own student."""
  student, depth = config.student, len(teacher.layers)
  capture = Capture(layers=config.teacher_cache.layers, mixers=config.teacher_cache.mixers)
  for name, asked, least in (("layers", capture.layers, INPUT), ("mixers", capture.mixers, 0)):
    if not all(least <= one < depth for one in asked):
      raise InputError(
        f"config.teacher_cache.{name}: {list(asked)}; list layers of the teacher, from {least} to {depth - 1}"
      )
  if student.model or student.config:
    architecture = (
      hf_config.read_config(locate(student.model))
      if student.model
      else hf_config.config_from_dict(student.config or {}, where="config.student.config")
    )
    # Layers that importance will choose are not known yet; config.teacher_cache has to name those.
    layers_from = None if isinstance(student.layers_from, str) else student.layers_from
    for stage in _taught(config):
      setting = Setting(
        steps=stage.steps,
        student=architecture,
        teacher=teacher,
        teacher_depth=depth,
        teacher_width=teacher.width,
        layers_from=layers_from,
      )
      terms = bind_terms(_terms(stage), setting, key=f"config.stages.{stage.name}.terms")
      capture = capture | teacher_capture(terms)
  return {"layers": list(capture.layers), "mixers": list(capture.mixers)}


class CacheIndex:
  """What a run trains from in place of a teacher.

  Args:
    config: The run's; its teacher.cache names the cache.
    batches: Of its stages.

  Attributes:
    teacher: Takes the live one's place.

  Raises:
    InputError: The cache has nothing for some rows, is damaged, or is of another teacher, tokenizer or text.
  """

  def __init__(self, config: RunConfig, *, batches: Mapping[str, Batches]):
    self._batches = batches
    with fail_together("config.teacher.cache"):
      subjects, sections = _subjects(config), cache.sections(config.teacher.cache)
      self._sections = {
        stage.name: [
          cache.find(sections, subjects(number, store), what=f"config.data.sources[{number}]")
          for number, store in enumerate(batches[stage.name].stores)
        ]
        for stage in _taught(config)
      }
    used = {section.identity: section for one in self._sections.values() for section in one}
    if not used:
      raise InputError("config.teacher.cache: no term of any stage looks at a teacher; leave it out")
    self._one = next(iter(used.values())).manifest
    settings = {
      f"teacher_cache.{key}": getattr(config.teacher_cache, key) for key in ("targets", "size", "temperature")
    }
    if config.teacher.model:
      settings["teacher.dtype"] = config.teacher.dtype
    for section in used.values():
      where = section.directory / cache.MANIFEST
      for key in ("teacher", "width", "depth", "vocab_size"):
        if section.manifest[key] != self._one[key]:
          raise InputError(f"{where}: {key} is not that of the other sections; set config.teacher.model")
      for key, value in settings.items():
        if (found := section.manifest[key.removeprefix("teacher_cache.").replace(".", "_")]) != value:
          raise InputError(f"{where}: made with {key} {found!r}, config.{key} is {value!r}; make them agree")
    digest = hashlib.sha256(json.dumps(sorted(used)).encode()).hexdigest()
    self.teacher = CachedTeacher(identity=digest, **{key: self._one[key] for key in ("width", "depth", "vocab_size")})

  def batches(self, stage: str, *, terms: Sequence[Term]) -> Batches:
    """Returns the batches of a stage with the teacher's signal that its terms need.

    Raises:
      InputError: The cache does not hold what they need.
    """
    if stage not in self._sections:
      return self._batches[stage]
    key, capture = f"config.stages.{stage}.terms", teacher_capture(terms)
    kept = targets(self._one, where=str(cache.MANIFEST), vocab=self._one["vocab_size"])
    for index, term in enumerate(terms):
      term.check_targets(kept, key=f"{key}[{index}]")
    if capture.qkv:
      raise InputError(
        f"{key}: a cache holds no queries, keys and values; leave out the terms that compare them, or "
        "config.teacher.cache"
      )
    for section in self._sections[stage]:
      for name, asked in (("layers", capture.layers), ("mixers", capture.mixers)):
        if lacks := sorted(set(asked) - set(section.manifest[name])):
          raise InputError(
            f"{key}: they need the teacher's {name} {lacks}, which {section.directory} lacks; run distill cache with "
            f"--config.teacher_cache.{name} naming all of {list(asked)} into another --workdir"
          )
    return self._batches[stage].with_signals(
      [functools.partial(one.read, capture=capture) for one in self._sections[stage]]
    )


def _subjects(config: RunConfig) -> Callable[[int, TokenStore], dict[str, Any]]:
  """(number of a source, its store) -> what its rows are of: the keys of `cache.SUBJECT` that the run knows."""
  spec, sources = config.teacher, config.data.sources
  teacher, adapters = "", []
  if spec.model:
    with fail_together("config.teacher"):
      teacher = safetensors_files.digest(locate(spec.model), stem="model", settings="config.json")
      entries = stack(spec)
      sums = [[_digest(entry), entry.weight, entry.mode] for entry in entries]
      named, places = routes(sources)
      adapters = [[sums[place] for place in chosen(entries, named[route])] for route in places]

  def subject(number: int, store: TokenStore) -> dict[str, Any]:
    taught = {"teacher": teacher, "adapters": adapters[number]} if teacher else {}
    return {**taught, "tokenizer": store.meta["tokenizer"], "length": store.length, "store": store.fingerprint}

  return subject


def _digest(entry: StackEntry) -> str:
  return safetensors_files.digest(peft.adapter_directory(entry.path), stem=peft.STEM, settings="adapter_config.json")
