"""distill init: writes a student of a smaller or newer architecture that starts from its teacher."""

from collections.abc import Sequence

from absl import flags

from distill.cli import models
from distill.cli.parsing import parse
from distill.errors import InputError
from distill.initialise.transfer import IMPORTANCE
from distill.jobs.init import Calibration, init

FLAGS = flags.FlagValues()
models.define(FLAGS, model="teacher", help="Directory of the teacher's base, or its name on the hub.")
_STUDENT = flags.DEFINE_string("student", None, "The student's config.json.", required=True, flag_values=FLAGS)
_CALIBRATION = flags.DEFINE_string(
  "calibration", None, "Text to measure on: .jsonl as for training, else plain.", required=True, flag_values=FLAGS
)
_OUT = flags.DEFINE_string("out", None, "Directory to write.", required=True, flag_values=FLAGS)
_LAYERS = flags.DEFINE_string(
  "layers_from",
  IMPORTANCE,
  "Teacher layer, from 0, for each student layer, as 0,3,6,10; importance leaves out those that change least.",
  flag_values=FLAGS,
)
_ROWS = flags.DEFINE_integer("rows", 64, "Rows of text to measure on.", 1, flag_values=FLAGS)
_LENGTH = flags.DEFINE_integer("length", 128, "Tokens of a row.", 2, flag_values=FLAGS)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Random seed of fresh parameters and of the choice of rows.", 0, flag_values=FLAGS
)


def main(arguments: Sequence[str]) -> int:
  """Writes the student, prints its source layers and its KL from the teacher, and returns the exit code."""
  parse(FLAGS, arguments)
  result = init(
    FLAGS.teacher,
    student=_STUDENT.value,
    calibration=Calibration(path=_CALIBRATION.value, rows=_ROWS.value, length=_LENGTH.value),
    out=_OUT.value,
    adapters=models.adapters(FLAGS),
    layers_from=_layers(_LAYERS.value),
    seed=_SEED.value,
  )
  print(result.summary)
  print(f"KL to the teacher, nats a token over {result.rows} rows: {result.kl:.3f}, fresh {result.fresh_kl:.3f}")
  print(f"wrote {_OUT.value}: {result.loader}")
  return 0


def _layers(text: str) -> list[int] | str:
  if text == IMPORTANCE:
    return text
  try:
    return [int(one) for one in text.split(",")]
  except ValueError as error:
    raise InputError(
      f"--layers_from={text}: this is not a list of layer numbers; give numbers such as 0,3,6,10, or the word "
      "`importance`"
    ) from error
