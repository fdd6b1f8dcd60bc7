"""Writes a run's teacher cache (`distill cache`), and opens it for a training that needs no teacher in memory."""

import pathlib
import sys
from collections.abc import Callable, Mapping
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
from distill.jobs.models import live_teacher
from distill.jobs.routes import chosen, routes, stack
from distill.jobs.stages import Stage
from distill.models.config import DecoderConfig
from distill.objectives.objective import needs_teacher, teacher_capture
from distill.objectives.term import Setting, Term
from distill.objectives.terms import bind_terms, read_terms
from distill.parallel.interruption import EXIT_INTERRUPTED, Interruption
from distill.parallel.mesh import batch_shards, make_mesh
from distill.parallel.processes import fail_together, is_writer
from distill.teachers.cache_index import CacheIndex
from distill.teachers.cache_writer import CacheWriter
from distill.teachers.live import LiveTeacher
from distill.teachers.row_format import RowFormat, row_format
from distill.teachers.sections import FORMAT, Section, claim
from distill.teachers.targets import read_targets
from distill.training.config import StageConfig
from distill.training.metrics import Progress
from distill.types import INPUT, Capture


def cache_teacher(recipe: Mapping[str, Any] | RunConfig, *, workdir: pathlib.Path) -> int:
  """Stores the teacher's signal for all text rows of the stages that learn from a teacher.

  After an interruption, the same call continues where the caching stopped.

  Args:
    recipe: The run's configuration, resolved or as a recipe.
    workdir: Directory of the teacher cache.

  Returns:
    The exit code: 0, or `EXIT_INTERRUPTED` if SIGTERM or SIGINT stopped the caching.

  Raises:
    InputError: The configuration, a file it names, or the workdir is wrong.
  """
  config = resolve(recipe)
  mesh = make_mesh(config.training.mesh)
  row_devices = batch_shards(mesh)
  if config.training.batch_size % row_devices:
    raise InputError(
      f"config.training.batch_size: {config.training.batch_size} rows do not divide evenly among the {row_devices} "
      f"parts of the mesh that hold rows (its axes but tensor); use a multiple of {row_devices}"
    )
  if not config.teacher.model:
    raise InputError(
      "config.teacher.model: is empty, so there is no teacher to cache; set it to a model directory or a hub name"
    )
  if not _taught(config):
    raise InputError(
      "config.stages: no term of any stage needs a teacher, so there is nothing to cache; add a term such as forward_kl"
    )
  base = hf_config.read_config(locate(config.teacher.model))
  read_targets(vars(config.teacher_cache), where="config.teacher_cache", vocab=base.vocab_size)
  states = _states(config, teacher=base)
  tokenizer = data.read_tokenizer(config)
  batches = data.read_batches(config, tokenizer=tokenizer, tokens=workdir / "tokens", mesh=mesh)
  teacher = live_teacher(config, mesh=mesh)
  sections = _claimed(config, batches, teacher=teacher, states=states, workdir=workdir)
  writers: dict[RowFormat, CacheWriter] = {}
  with Interruption() as interruption:
    for number, (section, store, route) in enumerate(sections, start=1):
      if section.format not in writers:
        dtype = jnp.dtype(config.training.dtype)
        writers[section.format] = CacheWriter(teacher, format=section.format, mesh=mesh, dtype=dtype)
      done = store.rows - sum(len(section.bounds(shard)) for shard in section.missing())
      rows = _Progress(f"[{number}/{len(sections)}]", done=done, store=store)
      try:
        whole = writers[section.format].fill(
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
  """Finds or creates the cache section of each token store that a stage reads to learn from a teacher.

  A section is the part of a teacher cache with one teacher's signal for the rows of one token store.

  Args:
    config: Configuration of the run.
    batches: Batches of each stage, by the stage's name.
    teacher: The teacher whose signal the sections store.
    states: Indices of the teacher's layers whose outputs the sections store ("layers") and whose mixer outputs they
      store ("mixers"), as `_states` returns them.
    workdir: Directory of the teacher cache.

  Returns:
    For each section: (section, its token store, index of the adapter set that teaches the store's rows, in the list of
    adapter sets that `routes` returns).

  Raises:
    InputError: A section for the same rows and teacher has other settings, or `workdir` cannot be written.
  """
  subjects = _subjects(config)
  places = routes(config.data.sources)[1]
  found: dict[str, tuple[Section, TokenStore, int]] = {}
  for stage in _taught(config):
    for number, store in enumerate(batches[stage.name].stores):
      manifest = {**_manifest(config, teacher=teacher, store=store), **states, **subjects(number, store)}
      manifest["shard_rows"] = row_format(manifest, where="config.teacher_cache").rows_per_shard(manifest["batch_size"])
      with fail_together("--workdir"):
        section = claim(workdir, manifest)
      found[section.identity] = section, store, places[number]
  return list(found.values())


def _taught(config: RunConfig) -> list[StageConfig]:
  """Returns the stages whose terms need a teacher."""
  return [stage for stage in config.stages if needs_teacher(_terms(stage))]


def _terms(stage: StageConfig) -> tuple[Term, ...]:
  return read_terms(stage.terms, key=f"config.stages.{stage.name}.terms")


class _Progress:
  """Shows how many rows of one token store are cached."""

  def __init__(self, name: str, *, done: int, store: TokenStore):
    self._done, self._length = done, store.length
    self._progress = Progress(name, done=done, total=store.rows, unit="row")
    self.close = self._progress.close

  def report(self, rows: int) -> None:
    """Advances the progress display by `rows` newly cached rows."""
    self._done += rows
    self._progress.update(self._done, tokens=rows * self._length)


def _line(section: Section, store: TokenStore) -> str:
  size = sum(path.stat().st_size for path in section.directory.glob("[0-9]*.safetensors"))
  tokens = store.rows * store.length
  return f"{section.directory}: {store.rows:,} rows, {size:,} bytes, {size / max(tokens, 1):.1f} bytes a token"


def _manifest(config: RunConfig, *, teacher: LiveTeacher, store: TokenStore) -> dict[str, Any]:
  """Returns the manifest entries that describe a section's rows, the teacher's size and dtypes, and the targets.

  A section is the part of a teacher cache for one teacher and one token store.
  """
  vocab = teacher.decoder.config.vocab_size
  kept = read_targets(vars(config.teacher_cache), where="config.teacher_cache", vocab=vocab)
  return {
    "format": FORMAT,
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
  """Returns which outputs of the teacher a cache stores: those that config.teacher_cache names or the terms need.

  Returns:
    {"layers": indices of the layers whose outputs are stored, "mixers": indices of the layers whose mixer outputs are
    stored}, both from 0 and ascending. Among "layers", −1 stands for the first layer's input.

  Raises:
    InputError: config.teacher_cache names a layer that the teacher lacks, or a term does not fit the student.
  """
  student, depth = config.student, len(teacher.layers)
  capture = Capture(layers=config.teacher_cache.layers, mixers=config.teacher_cache.mixers)
  for name, numbers, lowest in (("layers", capture.layers, INPUT), ("mixers", capture.mixers, 0)):
    if not all(lowest <= number < depth for number in numbers):
      raise InputError(
        f"config.teacher_cache.{name}: {list(numbers)} has a number that is not a layer of the teacher; use numbers "
        f"from {lowest} to {depth - 1}"
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


def open_index(config: RunConfig, batches: Mapping[str, Batches]) -> CacheIndex:
  """Opens the teacher cache of a run, and finds its sections for the run's token stores.

  Args:
    config: Configuration of the run; `teacher.cache` is the directory of the cache.
    batches: Batches of each stage, by the stage's name.

  Raises:
    InputError: The cache lacks some rows, is damaged, or belongs to another teacher, tokenizer or text.
  """
  spec, settings = config.teacher_cache, {}
  for key in ("targets", "size", "temperature"):
    settings[key] = f"teacher_cache.{key}", getattr(spec, key)
  if config.teacher.model:
    settings["teacher_dtype"] = "teacher.dtype", config.teacher.dtype
  with fail_together("config.teacher.cache"):
    subject = _subjects(config)
    subjects = {
      stage.name: [subject(number, store) for number, store in enumerate(batches[stage.name].stores)]
      for stage in _taught(config)
    }
    return CacheIndex(config.teacher.cache, subjects=subjects, settings=settings)


def cached_batches(index: CacheIndex, batches: Batches, *, stage: Stage) -> Batches:
  """Returns the batches of a stage with the cached teacher signal; unchanged if no term of the stage needs a teacher.

  Raises:
    InputError: The cache lacks a signal that a term of the stage needs.
  """
  if not needs_teacher(stage.terms):
    return batches
  key = f"config.stages.{stage.name}.terms"
  for number, term in enumerate(stage.terms):
    term.check_targets(index.targets, key=f"{key}[{number}]")
  return batches.with_signals(index.readers(stage.name, teacher_capture(stage.terms), key=key))


def _subjects(config: RunConfig) -> Callable[[int, TokenStore], dict[str, Any]]:
  """Returns a function (index of a data source, its token store) -> entries that a section's manifest must have.

  The entries identify the text and the teacher that the section was made from. They are 'tokenizer', 'length' and
  'store', and also 'teacher' and 'adapters' unless config.teacher.model is empty.
  """
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
