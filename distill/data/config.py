"""Configuration of a run's text."""

import dataclasses
from collections.abc import Mapping

from distill.configuration import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
  """Options that every data source has."""

  weight: float = option(1.0, help="Share of the rows drawn from this source, relative to the others.", above=0)
  adapters: tuple[str, ...] | None = option(
    None, help="Names of the teacher's adapters that teach these rows; None for all of them, an empty list for none."
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSourceConfig(SourceConfig):
  """Files of plain text."""

  kind: str = option("text", help="Plain text.", choices=("text",))
  path: str = option(help="A file or a glob; every file is a document.")
  blank_lines: bool = option(False, help="Blank lines separate documents within a file.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordSourceConfig(SourceConfig):
  """Options of sources whose records hold a text, or a prompt and its completion."""

  text_key: str = option("text", help="Field of a record that holds its text.")
  learn_prompt: bool = option(False, help="Train on prompts as well as on completions.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonlSourceConfig(RecordSourceConfig):
  """JSONL files: every line is a JSON object with a text, or with a prompt and its completion."""

  kind: str = option("jsonl", help="JSON lines.", choices=("jsonl",))
  path: str = option(help="A file or a glob.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HfSourceConfig(RecordSourceConfig):
  """A dataset of the Hugging Face `datasets` library."""

  kind: str = option("hf", help="Hugging Face `datasets`.", choices=("hf",))
  name: str = option(help="Dataset of the hub; or json, parquet, csv, arrow or text for local files.")
  subset: str = option("", help="Subset of the dataset.")
  split: str = option("train", help="Split of the dataset.")
  data_files: str = option("", help="A file or a glob, for local files.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsSourceConfig(RecordSourceConfig):
  """A TensorFlow dataset, read without TensorFlow."""

  kind: str = option("tfds", help="TensorFlow Datasets.", choices=("tfds",))
  name: str = option("", help="Dataset to download and prepare; give this or directory.")
  directory: str = option("", help="A prepared dataset, down to its version.")
  split: str = option("train", help="Split of the dataset.")


SOURCES: Mapping[str, type[SourceConfig]] = {
  "text": TextSourceConfig,
  "jsonl": JsonlSourceConfig,
  "hf": HfSourceConfig,
  "tfds": TfdsSourceConfig,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """The data sources of a run, and the rows that their text is packed into."""

  sources: tuple[SourceConfig, ...] = option(help="Data sources; rows are drawn from them by weight.", kinds=SOURCES)
  length: int = option(256, help="Tokens a row.", least=2)
  store: str = option("", help="Directory of the token stores; the run's own tokens/ where it is empty.")
