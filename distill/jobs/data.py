"""Loads a run's tokenizer, and builds the batches of each stage from its text."""

import pathlib

from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from distill.checkpoints.hub import locate
from distill.data.batches import Batches
from distill.data.sources import open_source
from distill.data.store import TokenStore, build_store
from distill.data.tokenizer import load_tokenizer
from distill.errors import InputError
from distill.jobs.config import RunConfig
from distill.jobs.routes import routes
from distill.parallel.mesh import process_rows


def tokenizer_path(config: RunConfig) -> str:
  """Returns the run's tokenizer directory: config.tokenizer, else the teacher's, else the student's model.

  Raises:
    InputError: None of the three is set.
  """
  path = config.tokenizer or config.teacher.model or config.student.model
  if not path:
    raise InputError(
      "config.tokenizer: is empty, and neither config.teacher.model nor config.student.model names a model that has "
      "one; give a tokenizer directory"
    )
  return str(locate(path))


def read_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
  """Loads the run's tokenizer.

  Raises:
    InputError: The configuration names no tokenizer, or it cannot be read.
  """
  return load_tokenizer(tokenizer_path(config))


def read_batches(
  config: RunConfig, *, tokenizer: PreTrainedTokenizerBase, tokens: pathlib.Path, mesh: Mesh
) -> dict[str, Batches]:
  """Returns the batches of each stage, by the stage's name.

  Stages with the same row length do not repeat rows: each begins where the previous one ends.

  Args:
    config: The run's configuration.
    tokenizer: The run's tokenizer.
    tokens: Directory in which token stores are found or built; config.data.store, if set, takes its place.
    mesh: The devices; this process reads the rows that its devices hold.

  Raises:
    InputError: A data source or a batch size is wrong, or a source has no token to predict.
  """
  if not config.data.sources:
    raise InputError("config.data.sources: is empty; give at least one source, as [{'kind': 'jsonl', 'path': …}]")
  shapes = {stage.name: config.stage_shape(stage) for stage in config.stages}
  stores = {
    length: _stores(config, tokenizer=tokenizer, length=length, tokens=tokens)
    for length in sorted({length for _, length in shapes.values()})
  }
  _, route_of_source = routes(config.data.sources)
  rows_read = dict.fromkeys(stores, 0)
  batches = {}
  for stage in config.stages:
    rows, length = shapes[stage.name]
    batches[stage.name] = Batches(
      stores[length],
      weights=[source.weight for source in config.data.sources],
      batch_size=rows,
      seed=config.seed,
      routes=route_of_source,
      first=rows_read[length],
      rows=process_rows(mesh, rows).tolist(),
    )
    rows_read[length] += rows * stage.steps
  return batches


def _stores(
  config: RunConfig, *, tokenizer: PreTrainedTokenizerBase, length: int, tokens: pathlib.Path
) -> list[TokenStore]:
  """Returns the token stores of all sources, packed to rows of `length` tokens."""
  stores = []
  for index, spec in enumerate(config.data.sources):
    key = f"config.data.sources[{index}]"
    source = open_source(spec, key=key)
    store = build_store(source, tokenizer=tokenizer, length=length, directory=config.data.store or tokens)
    if not store.teaches():
      raise InputError(f"{key}: no document has a token to predict; give documents with at least one token")
    stores.append(store)
  return stores
