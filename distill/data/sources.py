"""Where text comes from: files, HF datasets and TFDS, all as documents."""

import dataclasses
import difflib
import glob
import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
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


# None marks a required string; any other default also says the type.
_RECORD: dict[str, Any] = {"text_key": "text", "learn_prompt": False}
_FIELDS: dict[str, dict[str, Any]] = {
  "text": {"path": None, "blank_lines": False},
  "jsonl": {"path": None, **_RECORD},
  "hf": {"name": None, "subset": "", "split": "train", "data_files": "", **_RECORD},
  "tfds": {"name": "", "directory": "", "split": "train", **_RECORD},
}
_LOCAL_BUILDERS = ("arrow", "csv", "json", "parquet", "text")


def open_source(spec: Mapping[str, Any], *, key: str) -> Source:
  """The source that a configuration describes.

  Args:
    spec: One of
      dict(kind='text', path, blank_lines=False): files of plain text by glob, one document a file, or with blank_lines
        one a paragraph;
      dict(kind='jsonl', path, text_key='text'): an object a line, with text or with prompt and completion;
      dict(kind='hf', name, subset, split='train', data_files, text_key): HF `datasets`, from the hub, or name 'json',
        'parquet', 'csv', 'arrow' or 'text' with a glob of local data_files;
      dict(kind='tfds', name or directory, split='train', text_key): TensorFlow Datasets, read without TensorFlow.
      A prompt is read but not learnt, unless the source has learn_prompt=True.
    key: Where the specification stands in the configuration, for messages.

  Raises:
    InputError: Unknown kind or field, a value of the wrong type, missing file, or a record without the text.
  """
  fields = dict(spec)
  kind = fields.pop("kind", None)
  if not isinstance(kind, str) or kind not in _FIELDS:
    raise InputError(f"{key}.kind: unknown source {kind!r}; {_nearest(kind, _FIELDS)}")
  defaults = _FIELDS[kind]
  for name, value in fields.items():
    if name not in defaults:
      raise InputError(f"{key}.{name}: not a field of a {kind} source; {_nearest(name, defaults)}")
    wanted = bool if isinstance(defaults[name], bool) else str
    if not isinstance(value, wanted):
      raise InputError(f"{key}.{name}: {value!r} is a {type(value).__name__}; give a {wanted.__name__}")
  fields = {**defaults, **fields}
  for name, value in fields.items():
    if value is None:
      raise InputError(f"{key}.{name}: a {kind} source needs it")
  return {"text": _text, "jsonl": _jsonl, "hf": _hf, "tfds": _tfds}[kind]({"kind": kind, **fields}, key)


def _nearest(name: Any, known: Iterable[str]) -> str:
  near = difflib.get_close_matches(str(name), list(known), n=1)
  return f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"


def _reason(error: Exception) -> str:
  return " ".join(str(error).split("\n")[0].split()) or type(error).__name__


def _files(pattern: str, where: str) -> list[pathlib.Path]:
  paths = [pathlib.Path(path) for path in sorted(glob.glob(pattern, recursive=True)) if pathlib.Path(path).is_file()]
  if not paths:
    raise InputError(f"{where}: no file at {pattern!r}; give a file or a glob")
  return paths


def _digest(paths: Iterable[pathlib.Path]) -> str:
  digest = hashlib.sha256()
  for path in paths:
    with path.open("rb") as file:
      digest.update(hashlib.file_digest(file, "sha256").digest())
  return digest.hexdigest()


def _text(spec: dict[str, Any], key: str) -> Source:
  paths = _files(spec["path"], f"{key}.path")

  def documents() -> Iterator[Document]:
    for path in paths:
      try:
        with path.open(encoding="utf-8") as file:
          yield from _paragraphs(file) if spec["blank_lines"] else [Document(file.read())]
      except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); convert it first") from error

  return Source(spec, _digest(paths), documents)


def _paragraphs(lines: Iterable[str]) -> Iterator[Document]:
  for filled, group in itertools.groupby(lines, lambda line: bool(line.strip())):
    if filled:
      yield Document("".join(group).removesuffix("\n"))


def _document(record: Any, *, spec: Mapping[str, Any], where: str) -> Document:
  text_key = spec["text_key"]
  if isinstance(record, Mapping):
    prompt, completion, text = (_string(record.get(name), where) for name in ("prompt", "completion", text_key))
    if prompt is not None and completion is not None:
      return Document(prompt + completion) if spec["learn_prompt"] else Document(completion, prompt)
    if text is not None:
      return Document(text)
  raise InputError(f"{where}: no string {text_key!r}, nor prompt and completion; set text_key to the field of the text")


def _string(value: Any, where: str) -> str | None:
  if isinstance(value, bytes):
    try:
      return value.decode("utf-8")
    except UnicodeDecodeError as error:
      raise InputError(f"{where}: not UTF-8 at byte {error.start}; convert the data first") from error
  return value if isinstance(value, str) else None


def _jsonl(spec: dict[str, Any], key: str) -> Source:
  paths = _files(spec["path"], f"{key}.path")

  def documents() -> Iterator[Document]:
    for path in paths:
      with path.open("rb") as file:
        for number, line in enumerate(file, 1):
          if not line.strip():
            continue
          where = f"{path}:{number}"
          try:
            record = json.loads(line.decode("utf-8-sig"))
          except ValueError as error:
            raise InputError(f"{where}: not JSON in UTF-8 ({error}); each line must be one object") from error
          yield _document(record, spec=spec, where=where)

  return Source(spec, _digest(paths), documents)


def _hf(spec: dict[str, Any], key: str) -> Source:
  import datasets

  files: str | list[str] | None = spec["data_files"] or None
  paths = []
  if spec["name"] in _LOCAL_BUILDERS:
    paths = _files(spec["data_files"], f"{key}.data_files")
    files = [str(path) for path in paths]
  try:
    dataset = datasets.load_dataset(spec["name"], spec["subset"] or None, split=spec["split"], data_files=files)
  except Exception as error:
    raise InputError(f"{key}.name: cannot load dataset {spec['name']!r}: {_reason(error)}") from error
  used = {"prompt", "completion", spec["text_key"]} & set(dataset.column_names)
  # Columns that are not text may be costly to decode.
  rows = dataset.select_columns(sorted(used)) if used else dataset

  def documents() -> Iterator[Document]:
    return (_document(record, spec=spec, where=f"{key} record {i}") for i, record in enumerate(rows))

  return Source(spec, _digest(paths) if paths else dataset._fingerprint, documents)


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
    digest = _digest(map(pathlib.Path, builder.info.splits[spec["split"]].filepaths))
  except Exception as error:
    what = spec["directory"] or spec["name"]
    raise InputError(f"{key}: cannot read TFDS {what!r}: {_reason(error)}") from error

  def documents() -> Iterator[Document]:
    return (_document(data[i], spec=spec, where=f"{key} record {i}") for i in range(len(data)))

  return Source(spec, digest, documents)
