"""distill export: a model, or the student of a finished run, as a Hugging Face directory."""

import pathlib
from collections.abc import Sequence

from absl import flags

from distill.checkpoints import hf
from distill.checkpoints.hub import locate
from distill.cli.parsing import parse
from distill.errors import InputError

FLAGS = flags.FlagValues()
_MODEL = flags.DEFINE_string("model", "", "Model directory, or org/name[@revision] of the hub.", flag_values=FLAGS)
_WORKDIR = flags.DEFINE_string("workdir", "", "Directory of a finished run.", flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", None, "Directory to write.", required=True, flag_values=FLAGS)
_FORMAT = flags.DEFINE_enum("format", "hf", ["hf"], "Format to write.", flag_values=FLAGS)


def main(arguments: Sequence[str]) -> int:
  """Reads strictly, writes whole or not at all; nothing of the weights changes."""
  parse(FLAGS, arguments)
  if bool(_MODEL.value) == bool(_WORKDIR.value):
    raise InputError("--model and --workdir: give one of them")
  source = locate(_MODEL.value) if _MODEL.value else pathlib.Path(_WORKDIR.value) / "student"
  if _WORKDIR.value and not source.is_dir():
    raise InputError(f"{source}: no such directory; finish the run first, by the same distill train command")
  out = pathlib.Path(_OUT.value)
  if out.resolve() == source.resolve():
    raise InputError(f"--out={out}: is the directory that is read; name another")
  config, params = hf.load(source)
  hf.save(out, config=config, params=params, tokenizer_from=source, config_from=source)
  print(f"wrote {out}")
  return 0
