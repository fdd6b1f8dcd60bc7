"""distill merge: a base with its adapters in it, or several adapters as one."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from distill.adapters.combine import METHODS, as_adapter, combine
from distill.adapters.peft import write_adapter
from distill.adapters.stack import read_adapters
from distill.checkpoints import hf, hf_config
from distill.checkpoints.hub import locate
from distill.cli import models
from distill.cli.parsing import parse
from distill.errors import InputError
from distill.files.json_file import read_json
from distill.files.tensors import finite
from distill.models.config import DecoderConfig

FLAGS = flags.FlagValues()
models.define(FLAGS, what="Model directory of the base.")
_OUT = flags.DEFINE_string("out", None, "Directory to write.", required=True, flag_values=FLAGS)
_FORMAT = flags.DEFINE_enum(
  "format", "model", ["model", "adapter"], "A model in the base's dtypes, or a PEFT adapter.", flag_values=FLAGS
)
_COMBINE = flags.DEFINE_enum("combine", "sum", METHODS, "How changes are combined.", flag_values=FLAGS)
_DENSITY = flags.DEFINE_float("density", 0.5, "Share of each change that ties and dare keep.", 0, 1, flag_values=FLAGS)
_SEED = flags.DEFINE_integer("seed", 0, "Of what dare drops.", 0, flag_values=FLAGS)
_RANK = flags.DEFINE_integer("rank", 0, "Rank to cut each module's change to, 0: none.", 0, flag_values=FLAGS)
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def main(arguments: Sequence[str]) -> int:
  """Reads strictly, combines in float32, casts once, writes whole or not at all."""
  parse(FLAGS, arguments)
  source, out = locate(FLAGS.model), pathlib.Path(_OUT.value)
  stack = models.stack(FLAGS)
  if not stack:
    raise InputError("--adapters or --adapter_stack: give one of them")
  if any(path.resolve().is_relative_to(out.resolve()) for path in (source, *(entry.path for entry in stack))):
    raise InputError(f"--out={out}: is a directory that is read, or holds one; name another")
  if not _DENSITY.value:
    raise InputError("--density=0: would keep nothing; give a share above 0")
  if _RANK.value and _FORMAT.value == "model":
    raise InputError("--rank: is that of an adapter; add --format=adapter")
  config, params = hf.load(source)
  adapters = read_adapters(stack, config=config)
  how: dict[str, Any] = dict(method=_COMBINE.value, density=_DENSITY.value, seed=_SEED.value)
  if _FORMAT.value == "adapter":
    shares: dict[str, float] = {}
    factors = as_adapter(params, adapters=adapters, config=config, rank=_RANK.value, report=shares.__setitem__, **how)
    write_adapter(out, factors=factors, config=config, base=FLAGS.model)
    if shares:
      worst = min(shares, key=shares.__getitem__)
      print(
        f"rank {_RANK.value} keeps {100 * np.mean(list(shares.values())):.1f} % of ‖ΔW‖ in the mean of "
        f"{len(shares)} modules, {100 * shares[worst]:.1f} % of {worst}"
      )
  else:
    _write_model(out, source, *combine(params, adapters=adapters, config=config, **how), params=params, before=config)
  print(f"wrote {out}")
  return 0


def _write_model(
  out: pathlib.Path,
  source: pathlib.Path,
  config: DecoderConfig,
  merged: Mapping[str, Any],
  *,
  params: Mapping[str, Any],
  before: DecoderConfig,
) -> None:
  """Writes a model in the dtypes of its base; a parameter that the base has not got takes its embedding's."""
  fallback = np.asarray(params["embed.table"]).dtype
  cast = {}
  for name, x in merged.items():
    with np.errstate(over="ignore"):
      cast[name] = np.asarray(x).astype(params[name].dtype if name in params else fallback)
    if not finite(cast[name]):
      raise InputError(f"{out}: {name} has values that {cast[name].dtype} cannot hold; convert the base to float32")
  if config == before:
    hf.save(out, config=config, params=cast, tokenizer_from=source, config_from=source)
    return
  special = {key: value for key, value in read_json(source / "config.json").items() if key in _SPECIAL}
  written = hf_config.config_to_dict(config)
  held = {entry.ours for entry in hf_config.name_table(config)}
  if hf_config.config_from_dict(written, where=str(out)) != config or held != set(cast):
    raise InputError(
      f"{out}: the adapters make this a model that {config.family} checkpoints cannot hold, such as one with a bias "
      "where the family has none; use the adapters as they are"
    )
  hf.save(out, config=config, params=cast, tokenizer_from=source, special=special)
