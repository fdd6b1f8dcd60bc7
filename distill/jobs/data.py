"""What a run reads: its tokenizer, and the batches of each stage."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from transformers import PreTrainedTokenizerBase

from distill.checkpoints.hub import locate
from distill.data.batches import Batches
from distill.data.sources import open_source
from distill.data.store import TokenStore, build
from distill.data.tokenizer import load_tokenizer
from distill.errors import InputError
from distill.jobs.models import routes


def tokenizer_path(resolved: Mapping[str, Any]) -> str:
  """Where the run's tokenizer is: its own setting, else the teacher's, else the student's directory.

  Raises:
    InputError: There is none of them.
  """
  path = resolved["tokenizer"] or resolved["teacher"]["model"] or resolved["student"]["model"]
  if not path:
    raise InputError("config.tokenizer: give a directory; there is neither a teacher nor a student to take it from")
  return str(locate(path))


def shape(resolved: Mapping[str, Any], *, stage: str) -> tuple[int, int]:
  """(rows of a batch, tokens of a row) of a stage: its own, else the run's."""
  spec = resolved["stages"][stage]
  return spec["batch_size"] or resolved["training"]["batch_size"], spec["length"] or resolved["data"]["length"]


def read(resolved: Mapping[str, Any], *, workdir: pathlib.Path) -> tuple[PreTrainedTokenizerBase, dict[str, Batches]]:
  """The tokenizer, and batches by the name of their stage; a stage goes on where the one before it stopped reading.

  Raises:
    InputError: A source, the tokenizer or a size is wrong.
  """
  tokenizer = load_tokenizer(tokenizer_path(resolved))
  sources = resolved["data"]["sources"]
  if not sources:
    raise InputError("config.data.sources: give at least one source")
  weights = [source.get("weight", 1.0) for source in sources]
  for index, weight in enumerate(weights):
    if isinstance(weight, bool) or not isinstance(weight, int | float):
      raise InputError(f"config.data.sources[{index}].weight: {weight!r} is not a number")
  shapes = {name: shape(resolved, stage=name) for name in resolved["stages"]}
  stores = {
    length: _stores(resolved, tokenizer=tokenizer, length=length, workdir=workdir)
    for length in sorted({length for _, length in shapes.values()})
  }
  drawn = dict.fromkeys(stores, 0)
  batches = {}
  for name, (rows, length) in shapes.items():
    batches[name] = Batches(
      stores[length],
      weights=list(map(float, weights)),
      batch_size=rows,
      seed=resolved["seed"],
      routes=routes(sources)[1],
      first=drawn[length],
      process=(jax.process_index(), jax.process_count()),
    )
    drawn[length] += rows * resolved["stages"][name]["steps"]
  return tokenizer, batches


def _stores(
  resolved: Mapping[str, Any], *, tokenizer: PreTrainedTokenizerBase, length: int, workdir: pathlib.Path
) -> list[TokenStore]:
  """The stores of all sources, in rows of one length."""
  data = resolved["data"]
  stores = []
  for index, spec in enumerate(data["sources"]):
    fields = {name: value for name, value in spec.items() if name not in ("adapters", "weight")}
    source = open_source(fields, key=f"config.data.sources[{index}]")
    stores.append(build(source, tokenizer=tokenizer, length=length, directory=data["store"] or workdir / "tokens"))
  return stores
