"""distill export: writes a model, or the student of a finished run, as a Hugging Face directory."""

from collections.abc import Sequence

from absl import flags

from distill.cli import models
from distill.cli.parsing import parse
from distill.errors import InputError
from distill.jobs.export import export, finished_student

FLAGS = flags.FlagValues()
_MODEL = flags.DEFINE_string("model", "", models.MODEL, flag_values=FLAGS)
_WORKDIR = flags.DEFINE_string("workdir", "", "Directory of a finished run.", flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", None, "Directory to write.", required=True, flag_values=FLAGS)
_FORMAT = flags.DEFINE_enum("format", "hf", ["hf"], "Format to write.", flag_values=FLAGS)


def main(arguments: Sequence[str]) -> int:
  """Writes the model to the directory that --out names; returns the exit code."""
  parse(FLAGS, arguments)
  if bool(_MODEL.value) == bool(_WORKDIR.value):
    raise InputError("--model and --workdir: give exactly one of them")
  export(_MODEL.value or finished_student(_WORKDIR.value), out=_OUT.value)
  print(f"wrote {_OUT.value}")
  return 0
