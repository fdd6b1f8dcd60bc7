"""distill merge: merges adapters into their base, or combines several adapters into one."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from distill.adapters.combine import METHODS
from distill.cli import models
from distill.cli.parsing import parse
from distill.errors import InputError
from distill.jobs.merge import merge, merge_adapters

FLAGS = flags.FlagValues()
models.define(FLAGS, help="Directory of the base, or its name on the hub.")
_OUT = flags.DEFINE_string("out", None, "Directory to write.", required=True, flag_values=FLAGS)
_FORMAT = flags.DEFINE_enum(
  "format", "model", ["model", "adapter"], "A model in the base's dtypes, or a PEFT adapter.", flag_values=FLAGS
)
_COMBINE = flags.DEFINE_enum(
  "combine", "sum", METHODS, "Method that combines the adapters' changes.", flag_values=FLAGS
)
_DENSITY = flags.DEFINE_float(
  "density", 0.5, "Share of each change that ties and dare retain.", 0, 1, flag_values=FLAGS
)
_SEED = flags.DEFINE_integer("seed", 0, "Random seed of dare.", 0, flag_values=FLAGS)
_RANK = flags.DEFINE_integer(
  "rank", 0, "Rank to which the change of each module is cut; 0 cuts nothing.", 0, flag_values=FLAGS
)


def main(arguments: Sequence[str]) -> int:
  """Writes the merged model, or with --format=adapter the combined adapter; returns the exit code."""
  parse(FLAGS, arguments)
  adapters = models.adapters(FLAGS)
  if not adapters:
    raise InputError("--adapters and --adapter_stack: neither is given; give one of them")
  if _RANK.value and _FORMAT.value == "model":
    raise InputError("--rank: applies only to --format=adapter; add --format=adapter, or leave --rank out")
  combination: dict[str, Any] = {"method": _COMBINE.value, "density": _DENSITY.value, "seed": _SEED.value}
  if _FORMAT.value == "model":
    merge(FLAGS.model, adapters=adapters, out=_OUT.value, **combination)
  else:
    _print_shares(merge_adapters(FLAGS.model, adapters=adapters, out=_OUT.value, rank=_RANK.value, **combination))
  print(f"wrote {_OUT.value}")
  return 0


def _print_shares(shares: Mapping[str, float]) -> None:
  if not shares:
    return
  worst = min(shares, key=shares.__getitem__)
  print(
    f"rank {_RANK.value} retains {statistics.mean(shares.values()):.1%} of ‖ΔW‖ in the mean of {len(shares)} modules, "
    f"{shares[worst]:.1%} of {worst}"
  )
