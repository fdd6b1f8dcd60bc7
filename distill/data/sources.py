"""Where text comes from: files, HF datasets and TFDS, all as documents."""

import dataclasses
import difflib
import glob
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from distill.errors import InputError


@dataclasses.dataclass(frozen=True)
class Document:
  """A text, and the prompt before it that is read but not learnt."""

  text: str
  prompt: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
  """Documents in a fixed order.

  Attributes:
    spec: The configuration it was made from, with defaults filled in.
    digest: Changes when the content does.
    documents: A new iterator over all documents.
  """

  spec: Mapping[str, Any]
  digest: str
  documents: Callable[[], Iterator[Document]]


_FIELDS: dict[str, dict[str, Any]] = {
  "text": {"path": None},
  "jsonl": {"path": None, "text_key": "text"},
  "hf": {"name": None, "subset": "", "split": "train", "data_files": "", "text_key": "text"},
  "tfds": {"name": "", "directory": "", "split": "train", "text_key": "text"},
}


def open_source(spec: Mapping[str, Any], *, key: str) -> Source:
  """The source that a configuration describes.

  Args:
    spec: One of
      dict(kind='text', path): files of plain text by glob, one document a file;
      dict(kind='jsonl', path, text_key='text'): an object a line, with text or with prompt and completion;
      dict(kind='hf', name, subset, split='train', data_files, text_key): HF `datasets`, from the hub, or name 'json',
        'parquet', 'csv' or 'text' with local data_files;
      dict(kind='tfds', name or directory, split='train', text_key): TensorFlow Datasets, read without TensorFlow.
    key: Where the specification stands in the configuration, for messages.

  Raises:
    InputError: Unknown kind or field, missing file, or a record without the text.
  """
  fields = dict(spec)
  kind = fields.pop("kind", None)
  if kind not in _FIELDS:
    raise InputError(f"{key}.kind: unknown source {kind!r}; use one of {', '.join(_FIELDS)}")
  for name in fields:
    if name not in _FIELDS[kind]:
      near = difflib.get_close_matches(name, list(_FIELDS[kind]), n=1)
      raise InputError(f"{key}.{name}: not a field of a {kind} source; {_hint(near, _FIELDS[kind])}")
  fields = {**_FIELDS[kind], **fields}
  for name, value in fields.items():
    if value is None:
      raise InputError(f"{key}.{name}: a {kind} source needs it")
  return {"text": _text, "jsonl": _jsonl, "hf": _hf, "tfds": _tfds}[kind]({"kind": kind, **fields}, key)


def _hint(near: list[str], fields: Mapping[str, Any]) -> str:
  return f"did you mean {near[0]}?" if near else f"it has {', '.join(fields)}"


def _files(pattern: str, key: str) -> list[pathlib.Path]:
  paths = [pathlib.Path(path) for path in sorted(glob.glob(pattern, recursive=True)) if pathlib.Path(path).is_file()]
  if not paths:
    raise InputError(f"{key}.path: no file at {pattern}; give a file or a glob")
  return paths


def _digest(paths: list[pathlib.Path]) -> str:
  digest = hashlib.sha256()
  for path in paths:
    with path.open("rb") as file:
      digest.update(hashlib.file_digest(file, "sha256").digest())
  return digest.hexdigest()


def _read(path: pathlib.Path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise InputError(f"{path}: not UTF-8 at byte {error.start}; convert it first") from error


def _text(spec: dict[str, Any], key: str) -> Source:
  paths = _files(spec["path"], key)
  return Source(spec, _digest(paths), lambda: (Document(_read(path)) for path in paths))


def _document(record: Any, text_key: str, where: str) -> Document:
  if isinstance(record, Mapping):
    prompt, completion, text = (record.get(name) for name in ("prompt", "completion", text_key))
    if isinstance(prompt, str) and isinstance(completion, str):
      return Document(completion, prompt)
    if isinstance(text, bytes):
      text = text.decode("utf-8")
    if isinstance(text, str):
      return Document(text)
  raise InputError(f"{where}: no string {text_key!r}, nor prompt and completion; set text_key to the field of the text")


def _jsonl(spec: dict[str, Any], key: str) -> Source:
  paths = _files(spec["path"], key)

  def documents() -> Iterator[Document]:
    for path in paths:
      with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
          if not line.strip():
            continue
          try:
            record = json.loads(line)
          except ValueError as error:
            raise InputError(f"{path}:{number}: not JSON ({error}); each line must be one object") from error
          yield _document(record, spec["text_key"], f"{path}:{number}")

  return Source(spec, _digest(paths), documents)


def _hf(spec: dict[str, Any], key: str) -> Source:
  import datasets

  if spec["data_files"]:
    _files(spec["data_files"], f"{key}.data_files")
  try:
    dataset = datasets.load_dataset(
      spec["name"], spec["subset"] or None, split=spec["split"], data_files=spec["data_files"] or None
    )
  except Exception as error:
    raise InputError(f"{key}.name: cannot load dataset {spec['name']!r}: {str(error).splitlines()[0]}") from error

  def documents() -> Iterator[Document]:
    return (_document(record, spec["text_key"], f"{key} record {i}") for i, record in enumerate(dataset))

  return Source(spec, dataset._fingerprint if not spec["data_files"] else _hf_digest(spec), documents)


def _hf_digest(spec: Mapping[str, Any]) -> str:
  return _digest(_files(spec["data_files"], "data_files"))


def _tfds(spec: dict[str, Any], key: str) -> Source:
  import tensorflow_datasets as tfds

  if bool(spec["name"]) == bool(spec["directory"]):
    raise InputError(f"{key}: a tfds source needs either name or directory (a prepared dataset with its version)")
  try:
    if spec["directory"]:
      builder = tfds.builder_from_directory(spec["directory"])
    else:
      builder = tfds.builder(spec["name"], file_format="array_record")
      builder.download_and_prepare(file_format="array_record")
    data = builder.as_data_source(split=spec["split"])
  except Exception as error:
    what = spec["directory"] or spec["name"]
    raise InputError(f"{key}: cannot read TFDS {what!r}: {str(error).splitlines()[0]}") from error

  def documents() -> Iterator[Document]:
    return (_document(data[i], spec["text_key"], f"{key} record {i}") for i in range(len(data)))

  identity = f"{builder.info.full_name} {len(data)} {builder.info.splits.total_num_examples}"
  return Source(spec, hashlib.sha256(identity.encode()).hexdigest(), documents)
