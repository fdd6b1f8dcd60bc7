"""Sources of documents: files, Hugging Face datasets and TFDS."""

import dataclasses
import glob
import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from distill.configuration import read_kind
from distill.data.config import (
  SOURCES,
  HfSourceConfig,
  JsonlSourceConfig,
  RecordSourceConfig,
  SourceConfig,
  TextSourceConfig,
  TfdsSourceConfig,
)
from distill.errors import InputError


@dataclasses.dataclass(frozen=True)
class Document:
  """A text, and the prompt before it that is read but not trained on."""

  text: str
  prompt: str = ""


@dataclasses.dataclass(frozen=True)
class DocumentSource:
  """Documents in a fixed order.

  Attributes:
    spec: Options that determine which documents the source yields.
    digest: Digest of the content.
    documents: Returns a new iterator over all documents.
  """

  spec: Mapping[str, Any]
  digest: str
  documents: Callable[[], Iterator[Document]]


_LOCAL_BUILDERS = ("arrow", "csv", "json", "parquet", "text")


def open_source(spec: SourceConfig | Mapping[str, Any], *, key: str) -> DocumentSource:
  """Opens the source that a configuration describes.

  Args:
    spec: One of `SOURCES`, or a dict that is read into one.
    key: Where it stands in the configuration, for messages.

  Raises:
    InputError: The kind or a field is unknown or wrong, a file is missing, or a record has no text.
  """
  match read_kind(SOURCES, spec, key=key):
    case TextSourceConfig() as config:
      return _text(config, key)
    case JsonlSourceConfig() as config:
      return _jsonl(config, key)
    case HfSourceConfig() as config:
      return _hf(config, key)
    case TfdsSourceConfig() as config:
      return _tfds(config, key)
    case config:
      raise AssertionError(config)


def _spec(config: SourceConfig) -> dict[str, Any]:
  """Returns the options that affect which documents a source yields: all but its weight and its adapters."""
  return {name: value for name, value in dataclasses.asdict(config).items() if name not in ("weight", "adapters")}


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


def _text(config: TextSourceConfig, key: str) -> DocumentSource:
  paths = _files(config.path, f"{key}.path")

  def documents() -> Iterator[Document]:
    for path in paths:
      try:
        with path.open(encoding="utf-8") as file:
          yield from _paragraphs(file) if config.blank_lines else [Document(file.read())]
      except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); convert it first") from error

  return DocumentSource(_spec(config), _digest(paths), documents)


def _paragraphs(lines: Iterable[str]) -> Iterator[Document]:
  for filled, group in itertools.groupby(lines, lambda line: bool(line.strip())):
    if filled:
      yield Document("".join(group).removesuffix("\n"))


def _document(record: Any, *, config: RecordSourceConfig, where: str) -> Document:
  text_key = config.text_key
  if isinstance(record, Mapping):
    prompt, completion, text = (_string(record.get(name), where) for name in ("prompt", "completion", text_key))
    if prompt is not None and completion is not None:
      return Document(prompt + completion) if config.learn_prompt else Document(completion, prompt)
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


def _jsonl(config: JsonlSourceConfig, key: str) -> DocumentSource:
  paths = _files(config.path, f"{key}.path")

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
          yield _document(record, config=config, where=where)

  return DocumentSource(_spec(config), _digest(paths), documents)


def _hf(config: HfSourceConfig, key: str) -> DocumentSource:
  import datasets

  files: str | list[str] | None = config.data_files or None
  paths = []
  if config.name in _LOCAL_BUILDERS:
    paths = _files(config.data_files, f"{key}.data_files")
    files = [str(path) for path in paths]
  try:
    dataset = datasets.load_dataset(config.name, config.subset or None, split=config.split, data_files=files)
  except Exception as error:
    raise InputError(f"{key}.name: cannot load dataset {config.name!r}: {_reason(error)}") from error
  used = {"prompt", "completion", config.text_key} & set(dataset.column_names)
  # Other columns, such as images, may be costly to decode.
  rows = dataset.select_columns(sorted(used)) if used else dataset

  def documents() -> Iterator[Document]:
    return (_document(record, config=config, where=f"{key} record {i}") for i, record in enumerate(rows))

  return DocumentSource(_spec(config), _digest(paths) if paths else dataset._fingerprint, documents)


def _tfds(config: TfdsSourceConfig, key: str) -> DocumentSource:
  import tensorflow_datasets as tfds

  if bool(config.name) == bool(config.directory):
    raise InputError(f"{key}: a tfds source needs either name or directory (a prepared dataset with its version)")
  try:
    if config.directory:
      builder = tfds.builder_from_directory(config.directory)
    else:
      builder = tfds.builder(config.name, file_format="array_record")
      builder.download_and_prepare(file_format="array_record")
    data = builder.as_data_source(split=config.split)
    digest = _digest(map(pathlib.Path, builder.info.splits[config.split].filepaths))
  except Exception as error:
    what = config.directory or config.name
    raise InputError(f"{key}: cannot read TFDS {what!r}: {_reason(error)}") from error

  def documents() -> Iterator[Document]:
    return (_document(data[i], config=config, where=f"{key} record {i}") for i in range(len(data)))

  return DocumentSource(_spec(config), digest, documents)
