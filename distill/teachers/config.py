"""Configuration of the teacher, and of what a teacher cache stores of it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from distill.configuration import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
  """The teacher: a model with an ordered stack of adapters, or a teacher cache in its place."""

  model: str = option("", help="Model directory, or org/name[@revision] of the hub; empty for no teacher.")
  config: Mapping[str, Any] | None = option(
    None, help="Keys of the model's HF config.json, by which `distill plan` plans where the model is not at hand."
  )
  adapters: tuple[str, ...] = option((), help="PEFT directories or hub names, applied in this order.")
  adapter_stack: str = option("", help="JSON file of an ordered stack of adapters, in place of adapters.")
  dtype: str = option("float32", help="Dtype of the parameters in memory.", choices=("bfloat16", "float16", "float32"))
  cache: str = option("", help="Directory that `distill cache` wrote; the run then loads no teacher.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherCacheConfig:
  """Options of `distill cache`, which stores sparse targets and activations of a teacher."""

  targets: str = option(
    "top_k", help="The likeliest tokens (top_k), or tokens drawn from the teacher.", choices=("top_k", "sampled")
  )
  size: int = option(64, help="Tokens a position.", least=1)
  temperature: float = option(1.0, help="Divides the teacher's logits.", above=0)
  layers: tuple[int, ...] = option((), help="Layers whose outputs are stored as well; -1 is the first one's input.")
  mixers: tuple[int, ...] = option((), help="Layers whose mixers' outputs are stored as well.")
