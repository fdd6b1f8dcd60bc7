"""Hugging Face model directories, read and written strictly."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import transformers

from distill.checkpoints.families import (
  bamba,
  gemma,
  gemma2,
  gemma3,
  gpt2,
  gpt_oss,
  granite,
  granitemoehybrid,
  llama,
  mamba2,
  mistral,
  mixtral,
  olmo2,
  olmo3,
  phi3,
  qwen2,
  qwen3,
  qwen3_5,
  qwen3_moe,
  qwen3_next,
  smollm3,
)
from distill.checkpoints.name_table import Entry, spellings
from distill.checkpoints.tensor_sources import Source, pending
from distill.checkpoints.tensor_sources import sources as find_sources
from distill.errors import InputError
from distill.files import safetensors_files
from distill.files.json_file import read_json
from distill.files.replace import replace_directory
from distill.files.tensors import Reader
from distill.models.config import DecoderConfig
from distill.models.decoder import Decoder
from distill.tree import Params

FAMILIES: dict[str, ModuleType] = {
  "llama": llama,
  "mistral": mistral,
  "mixtral": mixtral,
  "qwen2": qwen2,
  "qwen3": qwen3,
  "qwen3_moe": qwen3_moe,
  "qwen3_5_text": qwen3_5,
  "qwen3_next": qwen3_next,
  "gemma": gemma,
  "gemma2": gemma2,
  "gemma3_text": gemma3,
  "phi3": phi3,
  "olmo2": olmo2,
  "olmo3": olmo3,
  "smollm3": smollm3,
  "granite": granite,
  "gpt2": gpt2,
  "gpt_oss": gpt_oss,
  "mamba2": mamba2,
  "bamba": bamba,
  "granitemoehybrid": granitemoehybrid,
}
TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
  "vocab.json",
  "merges.txt",
  "tokenizer.model",
)
# Copied as they are beside a model's weights: what turns text into tokens, and how to generate.
COMPANIONS = (*TOKENIZER_FILES, "generation_config.json")
# Patterns of the files that an export of a model or an adapter may have.
EXPORT_FILES = ("config.json", "adapter_config.json", *COMPANIONS, "*.safetensors", "*.safetensors.index.json")


def config_from_dict(values: Mapping[str, Any], *, where: str) -> DecoderConfig:
  """Architecture of an HF configuration given as a dict with `model_type`.

  Raises:
    InputError: Unknown family, or an attribute that the family refuses.
  """
  kind = values.get("model_type")
  if not isinstance(kind, str) or kind not in FAMILIES:
    raise InputError(f"{where}: model_type {str(kind)[:60]!r} is not supported; expected one of {', '.join(FAMILIES)}")
  try:
    return FAMILIES[kind].read(values, where=where)
  except InputError:
    raise
  except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
    # A translator trusts kinds of values that `Attributes` has no question for.
    raise InputError(
      f"{where}: a value is of the wrong kind or size ({error}); compare it with the original"
    ) from error


def read_config(directory: pathlib.Path) -> DecoderConfig:
  """Architecture of a model directory, from its config.json."""
  path = pathlib.Path(directory) / "config.json"
  return config_from_dict(read_json(path), where=str(path))


def table(config: DecoderConfig) -> tuple[Entry, ...]:
  """Every parameter of an architecture under our and under its family's names."""
  return FAMILIES[config.family].table(config)


def check_writable(config: DecoderConfig, *, where: str) -> None:
  """Refuses an architecture that its family's config.json has no words for, before work is spent on it.

  Raises:
    InputError: Such an architecture; `where`, file and key, begins the message.
  """
  try:
    FAMILIES[config.family].write(config)
  except InputError as error:
    raise InputError(f"{where}: {error}") from error


def loader(config: DecoderConfig) -> str:
  """Who can load a model of this architecture, in a few words."""
  name = FAMILIES[config.family].ARCHITECTURE
  if name in dir(transformers):  # hasattr would import the class.
    return f"transformers.{name} loads it"
  return f"distill alone loads it: transformers {transformers.__version__} has no {name}"


def load(directory: pathlib.Path) -> tuple[DecoderConfig, Params]:
  """Architecture and canonical parameters on the host, in the dtypes they are stored in.

  Raises:
    InputError: A file is missing or damaged, or a tensor is missing, unexpected, of the wrong shape or not finite.
  """
  config, found = sources(directory)
  with Reader() as reader:
    return config, {name: one.read(reader) for name, one in found.items()}


def sources(directory: pathlib.Path) -> tuple[DecoderConfig, dict[str, Source]]:
  """Architecture of a model directory and where its canonical parameters lie; of the weights only headers are read.

  Raises:
    InputError: A file is missing or damaged, or a tensor is missing, unexpected or of the wrong shape.
  """
  directory = pathlib.Path(directory)
  config = read_config(directory)
  entries, files = table(config), safetensors_files.stored(directory, stem="model")
  ignored = getattr(FAMILIES[config.family], "IGNORED", "")
  stored = {name: files[there] for name, there in spellings(files, table=entries, ignored=ignored).items()}
  if missing := next((entry.theirs for entry in entries if entry.theirs not in stored), None):
    raise InputError(f"{directory}: tensor {missing} is missing; config.json and weights do not agree")
  extra = set(stored) - {entry.theirs for entry in entries}
  head = "lm_head.weight" if config.tie_embeddings and "lm_head.weight" in extra else None
  if unexpected := sorted(extra - {head}):
    raise InputError(
      f"{directory}: unexpected tensor {unexpected[0]}; {len(unexpected)} are not of a {config.family} model"
    )
  found = find_sources(
    entries, stored=stored, shapes=shapes(config, where=str(directory / "config.json")), where=str(directory)
  )
  if head is not None:
    embedding = found["embed.table"].pieces[0][0]
    if stored[head].shape != found["embed.table"].shape:
      raise InputError(f"{directory}: {head} differs from the embedding it is tied to in config.json")
    twin = (dataclasses.replace(embedding, theirs=head), stored[head])
    found["embed.table"] = dataclasses.replace(found["embed.table"], twin=twin)
  return config, found


def shapes(config: DecoderConfig, *, where: str = "config.json") -> dict[str, tuple[int, ...]]:
  """Shape of every canonical parameter.

  Raises:
    InputError: The sizes are beyond what arrays can have.
  """
  try:
    decoder = Decoder(config)
  except (TypeError, ValueError, ArithmeticError) as error:
    raise InputError(f"{where}: its sizes make no model ({error}); compare it with the original") from error
  cut = {name: x.shape[name.startswith("groups.") :] for name, x in decoder.abstract().items()}
  return {one: tuple(shape) for name, shape in cut.items() for one in decoder.canonical(name)}


def save(
  directory: pathlib.Path,
  *,
  config: DecoderConfig,
  params: Mapping[str, Any],
  tokenizer_from: pathlib.Path | None = None,
  config_from: pathlib.Path | None = None,
  special: Mapping[str, int | None] | None = None,
  max_file_bytes: int = 5 * 10**9,
) -> None:
  """Writes a model directory, whole or not at all.

  Args:
    directory: Must be absent, empty, or an earlier export.
    config: Architecture.
    params: Canonical parameters; each keeps its dtype.
    tokenizer_from: Directory whose tokenizer files and generation_config.json are copied as they are.
    config_from: Directory whose config.json is copied as it is, where the architecture has not changed.
    special: Ids of special tokens for a new config.json, such as eos_token_id.
    max_file_bytes: Tensors are spread over several files with an index above it.

  Raises:
    InputError: The directory holds something else or cannot be written.
  """
  directory = pathlib.Path(directory)
  tensors = pending(table(config), params=params)
  with replace_directory(directory, marker="config.json", files=EXPORT_FILES) as work:
    safetensors_files.write(work, tensors, stem="model", max_file_bytes=max_file_bytes)
    if config_from is not None:
      shutil.copyfile(pathlib.Path(config_from) / "config.json", work / "config.json")
    else:
      (work / "config.json").write_text(json.dumps(_config_json(config, tensors, special or {}), indent=2) + "\n")
    if tokenizer_from is not None:
      for name in COMPANIONS:
        if (source := pathlib.Path(tokenizer_from) / name).is_file():
          shutil.copyfile(source, work / name)


def _config_json(config, tensors, special) -> dict[str, Any]:
  family = FAMILIES[config.family]
  dtypes = {str(x.dtype) for x in tensors.values()}
  values = {
    "architectures": [family.ARCHITECTURE],
    "model_type": config.family,
    "dtype": dtypes.pop() if len(dtypes) == 1 else "float32",
    **family.write(config),
  }
  return {**values, **special}
