"""What a run reads: its tokenizer, and the batches of each stage."""

import pathlib

import jax
from transformers import PreTrainedTokenizerBase

from distill.checkpoints.hub import locate
from distill.data.batches import Batches
from distill.data.sources import open_source
from distill.data.store import TokenStore, build
from distill.data.tokenizer import load_tokenizer
from distill.errors import InputError
from distill.jobs.config import RunConfig
from distill.jobs.models import routes


def tokenizer_path(config: RunConfig) -> str:
  """Returns the run's tokenizer directory: its own setting, else the teacher's, else the student's.

  Raises:
    InputError: There is none of them.
  """
  path = config.tokenizer or config.teacher.model or config.student.model
  if not path:
    raise InputError("config.tokenizer: give a directory; there is neither a teacher nor a student to take it from")
  return str(locate(path))


def read(config: RunConfig, *, workdir: pathlib.Path) -> tuple[PreTrainedTokenizerBase, dict[str, Batches]]:
  """Returns the tokenizer, and batches by the name of their stage.

  Stages that read the same stores do not read the same rows: each begins where the one before it ends.

  Raises:
    InputError: A source, the tokenizer or a size is wrong.
  """
  tokenizer = load_tokenizer(tokenizer_path(config))
  if not config.data.sources:
    raise InputError("config.data.sources: give at least one source")
  shapes = {stage.name: config.stage_shape(stage) for stage in config.stages}
  stores = {
    length: _stores(config, tokenizer=tokenizer, length=length, workdir=workdir)
    for length in sorted({length for _, length in shapes.values()})
  }
  rows_read = dict.fromkeys(stores, 0)
  batches = {}
  for stage in config.stages:
    rows, length = shapes[stage.name]
    batches[stage.name] = Batches(
      stores[length],
      weights=[source.weight for source in config.data.sources],
      batch_size=rows,
      seed=config.seed,
      routes=routes(config.data.sources)[1],
      first=rows_read[length],
      process=(jax.process_index(), jax.process_count()),
    )
    rows_read[length] += rows * stage.steps
  return tokenizer, batches


def _stores(
  config: RunConfig, *, tokenizer: PreTrainedTokenizerBase, length: int, workdir: pathlib.Path
) -> list[TokenStore]:
  """The stores of all sources, in rows of one length."""
  directory = config.data.store or workdir / "tokens"
  stores = []
  for index, spec in enumerate(config.data.sources):
    source = open_source(spec, key=f"config.data.sources[{index}]")
    stores.append(build(source, tokenizer=tokenizer, length=length, directory=directory))
  return stores
