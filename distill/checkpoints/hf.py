"""Loads model directories in the Hugging Face format into host memory, and saves them."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from distill.checkpoints import hf_config
from distill.checkpoints.name_table import spellings
from distill.checkpoints.parameter_sources import ParameterSource, parameter_sources, tensors_to_write
from distill.checkpoints.registry import FAMILIES
from distill.checkpoints.tensor_source import SafetensorsSource
from distill.errors import InputError
from distill.files import safetensors_files
from distill.files.replace import replace_directory
from distill.models.config import DecoderConfig
from distill.tree import Params

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
# Copied unchanged with a model's weights: they turn text into tokens, and set how to generate.
COMPANIONS = (*TOKENIZER_FILES, "generation_config.json")
# Patterns of the files that an export of a model or an adapter may have.
EXPORT_FILES = ("config.json", "adapter_config.json", *COMPANIONS, "*.safetensors", "*.safetensors.index.json")


def load(directory: pathlib.Path) -> tuple[DecoderConfig, Params]:
  """Loads a model directory: its configuration, and canonical parameters on the host in the dtypes of the files.

  Raises:
    InputError: A file is missing or damaged, or a tensor is missing, unexpected, of the wrong shape or not finite.
  """
  config, found = sources(directory)
  return config, {name: source.read() for name, source in found.items()}


def sources(directory: pathlib.Path) -> tuple[DecoderConfig, dict[str, ParameterSource]]:
  """Opens a model directory; returns its configuration, and canonical name -> source that reads the parameter.

  Only the headers of the weight files are read here.

  Raises:
    InputError: A file is missing or damaged, or a tensor is missing, unexpected or of the wrong shape.
  """
  directory = pathlib.Path(directory)
  config = hf_config.read_config(directory)
  entries, tensors = hf_config.name_table(config), SafetensorsSource(directory, stem="model")
  ignored, found = FAMILIES[config.family].ignored_tensors, tensors.tensors()
  infos = {name: found[stored] for name, stored in spellings(found, table=entries, ignored=ignored).items()}
  if missing := next((entry.theirs for entry in entries if entry.theirs not in infos), None):
    raise InputError(f"{directory}: tensor {missing} is missing; fetch config.json and weights of the same model")
  extra = set(infos) - {entry.theirs for entry in entries}
  head = "lm_head.weight" if config.tie_embeddings and "lm_head.weight" in extra else None
  if unexpected := sorted(extra - {head}):
    raise InputError(
      f"{directory}: unexpected tensor {unexpected[0]} ({len(unexpected)} tensors are not part of a {config.family} "
      "model with this config.json); fetch config.json and weights of the same model"
    )
  shapes = hf_config.shapes(config, where=str(directory / "config.json"))
  sources = parameter_sources(entries, tensors=tensors, infos=infos, shapes=shapes, where=str(directory))
  if head is not None:
    embedding = sources["embed.table"]
    if infos[head].shape != embedding.shape:
      raise InputError(
        f"{directory}: {head} differs from the embedding, but config.json ties them; set tie_word_embeddings to false"
      )
    tied_head = (dataclasses.replace(embedding.pieces[0][0], theirs=head), infos[head])
    sources["embed.table"] = dataclasses.replace(embedding, tied_head=tied_head)
  return config, sources


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
  """Saves a model as a directory in the Hugging Face format, which appears complete or not at all.

  Args:
    directory: The directory to write: absent, empty, or an earlier export, which is replaced.
    config: The model's configuration.
    params: Canonical parameters; each keeps its dtype.
    tokenizer_from: Directory whose tokenizer files and generation_config.json are copied unchanged.
    config_from: Directory whose config.json is copied unchanged, if it has the same configuration; None writes a new
      one from `config`.
    special: Ids of special tokens for a new config.json, such as eos_token_id.
    max_file_bytes: Largest size of a weight file in bytes; larger models are split into several files with an index.

  Raises:
    InputError: The directory holds other files, or cannot be written.
  """
  tensors = tensors_to_write(hf_config.name_table(config), params=params)
  with replace_directory(pathlib.Path(directory), marker="config.json", files=EXPORT_FILES) as work:
    safetensors_files.write(work, tensors, stem="model", max_file_bytes=max_file_bytes)
    if config_from is not None:
      shutil.copyfile(pathlib.Path(config_from) / "config.json", work / "config.json")
    else:
      dtypes = {str(x.dtype) for x in tensors.values()}
      values = {
        "architectures": [FAMILIES[config.family].architecture],
        "dtype": dtypes.pop() if len(dtypes) == 1 else "float32",
        **hf_config.config_to_dict(config),
        **(special or {}),
      }
      (work / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    if tokenizer_from is not None:
      for name in COMPANIONS:
        if (source := pathlib.Path(tokenizer_from) / name).is_file():
          shutil.copyfile(source, work / name)
