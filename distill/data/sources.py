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
  """A text, and a prompt before it. The model reads the prompt, but is not trained to predict it."""

  text: str
  prompt: str = ""


@dataclasses.dataclass(frozen=True)
class DocumentSource:
  """A source of documents, which are always in the same order.

  Attributes:
    spec: Options that determine which documents the source yields.
    digest: Digest of the content, which changes if the documents change.
    documents: Returns a new iterator over all documents.
  """

  spec: Mapping[str, Any]
  digest: str
  documents: Callable[[], Iterator[Document]]


_LOCAL_BUILDERS = ("arrow", "csv", "json", "parquet", "text")


def open_source(spec: SourceConfig | Mapping[str, Any], *, key: str) -> DocumentSource:
  """Opens the source that a configuration describes.

  Args:
    spec: An instance of one of the classes in `SOURCES`, or a dict of its fields.
    key: Key of the source in the configuration, for error messages.

  Raises:
    InputError: The kind or a field is unknown or wrong, or a file is missing. Reading the documents raises it for a
      record without text.
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


def _files(pattern: str, key: str) -> list[pathlib.Path]:
  paths = [pathlib.Path(path) for path in sorted(glob.glob(pattern, recursive=True)) if pathlib.Path(path).is_file()]
  if not paths:
    raise InputError(f"{key}: no file matches {pattern!r}; give the path of a file, or a glob")
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
        raise InputError(
          f"{path}: the file is not UTF-8 text ({error.reason} at byte {error.start}); convert it to UTF-8"
        ) from error

  return DocumentSource(_spec(config), _digest(paths), documents)


def _paragraphs(lines: Iterable[str]) -> Iterator[Document]:
  for filled, group in itertools.groupby(lines, lambda line: bool(line.strip())):
    if filled:
      yield Document("".join(group).removesuffix("\n"))


def _document(record: Any, *, config: RecordSourceConfig, record_name: str) -> Document:
  text_key = config.text_key
  if isinstance(record, Mapping):
    prompt, completion, text = (_string(record.get(name), record_name) for name in ("prompt", "completion", text_key))
    if prompt is not None and completion is not None:
      return Document(prompt + completion) if config.learn_prompt else Document(completion, prompt)
    if text is not None:
      return Document(text)
  raise InputError(
    f"{record_name}: the record has neither a string in the field {text_key!r} nor strings in the fields 'prompt' and "
    "'completion'; set text_key to the field that holds the text"
  )


def _string(value: Any, record_name: str) -> str | None:
  if isinstance(value, bytes):
    try:
      return value.decode("utf-8")
    except UnicodeDecodeError as error:
      raise InputError(
        f"{record_name}: the record has text that is not UTF-8 at byte {error.start}; convert the data to UTF-8"
      ) from error
  return value if isinstance(value, str) else None


def _jsonl(config: JsonlSourceConfig, key: str) -> DocumentSource:
  paths = _files(config.path, f"{key}.path")

  def documents() -> Iterator[Document]:
    for path in paths:
      with path.open("rb") as file:
        for number, line in enumerate(file, 1):
          if not line.strip():
            continue
          try:
            record = json.loads(line.decode("utf-8-sig"))
          except ValueError as error:
            raise InputError(
              f"{path}:{number}: the line is not JSON in UTF-8 ({error}); write one JSON object per line"
            ) from error
          yield _document(record, config=config, record_name=f"{path}:{number}")

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
    reason = _reason(error)
    raise InputError(
      f"{key}.name: the dataset {config.name!r} cannot be loaded ({reason}); check name, subset, split and data_files"
    ) from error
  used = {"prompt", "completion", config.text_key} & set(dataset.column_names)
  # Other columns, such as images, may be costly to decode.
  rows = dataset.select_columns(sorted(used)) if used else dataset

  def documents() -> Iterator[Document]:
    return (_document(record, config=config, record_name=f"{key} record {i}") for i, record in enumerate(rows))

  return DocumentSource(_spec(config), _digest(paths) if paths else dataset._fingerprint, documents)


def _tfds(config: TfdsSourceConfig, key: str) -> DocumentSource:
  import tensorflow_datasets as tfds

  if bool(config.name) == bool(config.directory):
    raise InputError(
      f"{key}: a source of kind 'tfds' needs exactly one of name and directory; set name to download a dataset, or "
      "directory to read a prepared one"
    )
  try:
    if config.directory:
      builder = tfds.builder_from_directory(config.directory)
    else:
      builder = tfds.builder(config.name, file_format="array_record")
      builder.download_and_prepare(file_format="array_record")
    data = builder.as_data_source(split=config.split)
    digest = _digest(map(pathlib.Path, builder.info.splits[config.split].filepaths))
  except Exception as error:
    dataset, reason = config.directory or config.name, _reason(error)
    raise InputError(
      f"{key}: the TFDS dataset {dataset!r} cannot be read ({reason}); check name, directory and split"
    ) from error

  def documents() -> Iterator[Document]:
    return (_document(data[i], config=config, record_name=f"{key} record {i}") for i in range(len(data)))

  return DocumentSource(_spec(config), digest, documents)
