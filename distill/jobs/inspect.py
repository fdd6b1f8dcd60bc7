"""The inspect job: describes a directory that distill or another library wrote."""

import collections
import itertools
import json
import math
import pathlib
from collections.abc import Iterator

import numpy as np

from distill.adapters.peft import STEM, adapter_subfolders
from distill.adapters.report import describe
from distill.checkpoints import hf_config
from distill.checkpoints.hub import locate
from distill.data.store import TokenStore
from distill.errors import InputError
from distill.files import safetensors_files
from distill.files.json_file import read_json
from distill.jobs.loading import Path
from distill.jobs.run_directory import RunDirectory
from distill.teachers.sections import MANIFEST, Section, open_sections
from distill.training.checkpoint import notes_path


def inspect(directory: Path, *, model: Path = "") -> Iterator[str]:
  """Yields lines that describe a model, adapters, a run, a checkpoint, a token store or a teacher cache.

  Args:
    directory: The directory, or org/name[@revision] of the hub.
    model: Base model (directory or hub name) to compare an adapter's changes with; empty to compare with none.

  Returns:
    Lines of text. They are computed lazily, so an error may follow correct lines.

  Raises:
    InputError: The directory is missing, damaged, or of none of these kinds.
  """
  path = locate(directory)
  if not path.is_dir():
    raise InputError(f"{path}: no such directory; correct the path")
  if (path / "adapter_config.json").is_file():
    return _adapter(path, model)
  if model and not adapter_subfolders(path):
    raise InputError(f"model={model}: is used only for an adapter, but {path} is not an adapter; leave model out")
  if (path / "meta.json").is_file():
    return _store(path)
  if notes_path(path).is_file():
    return _checkpoint(path)
  if (path / "config.json").is_file():
    values = read_json(path / "config.json")
    return _run(path, values) if "fingerprint" in values else _model(path)
  if adapter_subfolders(path):
    return _adapters(path, model)
  if (path / MANIFEST).is_file():
    return _section(Section(path))
  if any(path.glob(f"*/{MANIFEST}")):
    return itertools.chain.from_iterable(map(_section, open_sections(path)))
  raise InputError(
    f"{path}: is neither a model, an adapter, a run, a checkpoint, a token store nor a teacher cache, because it has "
    "no config.json or other file that marks one; correct the path"
  )


def _tensors(directory: pathlib.Path, stem: str) -> Iterator[str]:
  entries = safetensors_files.header(directory, stem=stem)
  sizes = {name: int(np.prod(shape)) for name, (_, shape) in entries.items()}
  dtypes = collections.Counter(dtype for dtype, _ in entries.values())
  stored = ", ".join(f"{count} of {dtype}" for dtype, count in sorted(dtypes.items()))
  yield f"tensors: {len(entries)} ({stored}), {sum(sizes.values()):,} parameters"
  for name, (dtype, shape) in sorted(entries.items()):
    yield f"  {name}  {dtype} {list(shape)}"


def _model(directory: pathlib.Path) -> Iterator[str]:
  config = hf_config.read_config(directory)
  kinds = collections.Counter(layer.mixer.kind for layer in config.layers)
  layers = ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
  yield f"model: {config.family}"
  yield f"layers: {len(config.layers)} ({layers}), width {config.width}, vocabulary {config.vocab_size:,}"
  yield f"embeddings: {'tied' if config.tie_embeddings else 'untied'}"
  yield from _tensors(directory, "model")


def _adapter(directory: pathlib.Path, model: Path) -> Iterator[str]:
  yield from describe(directory, model=locate(model) if model else None)
  yield from _tensors(directory, STEM)


def _adapters(directory: pathlib.Path, model: Path) -> Iterator[str]:
  inner = adapter_subfolders(directory)
  if len(inner) > 1:
    yield f"adapters: {', '.join(path.name for path in inner)}"
  for path in inner:
    yield f"{path}:" if len(inner) > 1 else f"in: {path.name}"
    yield from _adapter(path, model)


def _store(directory: pathlib.Path) -> Iterator[str]:
  meta = TokenStore(directory).meta
  yield f"token store: {meta['rows']:,} rows of {meta['length']} tokens"
  yield f"text: {meta['documents']:,} documents, {meta['tokens']:,} tokens, {meta['bytes']:,} bytes"
  yield f"source: {json.dumps(meta['source'])}"
  yield f"fingerprint: {meta['fingerprint']}"


def _section(section: Section) -> Iterator[str]:
  manifest, missing = section.manifest, section.missing()
  yield f"teacher cache: {section.count:,} rows of {manifest['length']} tokens, of {json.dumps(manifest['source'])}"
  yield f"in: {section.directory}{f' ({len(missing)} shards missing)' if missing else ''}"
  stored = [f"{manifest['targets']} {manifest['size']} at temperature {manifest['temperature']}"]
  stored += [f"{name} {manifest[name]}" for name in ("layers", "mixers") if manifest[name]]
  size = sum(path.stat().st_size for path in section.directory.glob("[0-9]*.safetensors"))
  done = section.count - sum(len(section.bounds(shard)) for shard in missing)
  yield f"stored: {', '.join(stored)}; {size / max(done * manifest['length'], 1):.1f} bytes a token"
  yield f"teacher: {manifest['teacher']}, {len(manifest['adapters'])} adapters"
  yield f"identity: {section.identity}"


def _checkpoint(directory: pathlib.Path) -> Iterator[str]:
  where = notes_path(directory)
  notes = read_json(where)
  try:
    digests, extra = dict(notes["digests"]), dict(notes["extra"])
    shapes = {name: json.loads(text[text.index("[") : text.rindex(":")]) for name, text in digests.items()}
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise InputError(f"{where}: is damaged ({error!r}); inspect another checkpoint of the run") from error
  yield f"checkpoint: {', '.join(f'{key} {value}' for key, value in extra.items())}"
  sizes: collections.Counter[str] = collections.Counter()
  for name, shape in shapes.items():
    top, second = name.split(".")[:2]
    sizes[second if top == "params" else top] += math.prod(shape)
  yield f"numbers: {', '.join(f'{count:,} of {branch}' for branch, count in sizes.items())}"
  for name, text in sorted(digests.items()):
    yield f"  {name}  {text}"


def _run(directory: pathlib.Path, values: dict) -> Iterator[str]:
  run = RunDirectory(directory)
  try:
    stages = ", ".join(stage["name"] for stage in values["config"]["stages"])
  except (KeyError, TypeError) as error:
    raise InputError(f"{run.config}: is damaged ({error!r}); inspect a checkpoint of the run instead") from error
  yield f"run: stages {stages}"
  yield f"fingerprint: {values['fingerprint']}"
  yield f"checkpoints: {', '.join(map(str, run.steps())) or 'none'}"
  results = [path.name for path in (run.student, run.adapter) if path.is_dir()]
  yield f"results: {', '.join(results) or 'none yet'}"
