"""What a run reads: its tokenizer, and the batches of each stage."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from transformers import PreTrainedTokenizerBase

from distill.data.batches import Batches
from distill.data.sources import open_source
from distill.data.store import build
from distill.data.tokenizer import load_tokenizer
from distill.errors import InputError
from distill.models.hub import locate
from distill.training.models import routes


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
  """The tokenizer, and batches by the name of their stage; stages of one shape share them.

  Raises:
    InputError: A source, the tokenizer or a size is wrong.
  """
  tokenizer = load_tokenizer(tokenizer_path(resolved))
  if not resolved["data"]["sources"]:
    raise InputError("config.data.sources: give at least one source")
  shapes = {name: shape(resolved, stage=name) for name in resolved["stages"]}
  made = {one: _batches(resolved, tokenizer=tokenizer, shape=one, workdir=workdir) for one in set(shapes.values())}
  return tokenizer, {name: made[one] for name, one in shapes.items()}


def _batches(
  resolved: Mapping[str, Any], *, tokenizer: PreTrainedTokenizerBase, shape: tuple[int, int], workdir: pathlib.Path
) -> Batches:
  data, (rows, length) = resolved["data"], shape
  stores, weights = [], []
  for index, spec in enumerate(data["sources"]):
    fields, key = dict(spec), f"config.data.sources[{index}]"
    fields.pop("adapters", None)
    weights.append(float(fields.pop("weight", 1.0)))
    source = open_source(fields, key=key)
    directory = data["store"] or workdir / "tokens"
    stores.append(build(source, tokenizer=tokenizer, length=length, directory=directory))
  return Batches(
    stores,
    weights=weights,
    batch_size=rows,
    seed=resolved["seed"],
    routes=routes(data["sources"])[1],
    process=(jax.process_index(), jax.process_count()),
  )
