"""distill score: computes logits and hidden states of a model for given tokens."""

from collections.abc import Sequence

from absl import flags

from distill.cli import models
from distill.cli.parsing import parse
from distill.errors import InputError
from distill.jobs.score import check_writable, score, write_scores

FLAGS = flags.FlagValues()
models.define(FLAGS)
_TOKENS = flags.DEFINE_string(
  "tokens", None, "A .npy file of int32 token ids [B, T].", required=True, flag_values=FLAGS
)
_OUT = flags.DEFINE_string("out", None, "The .npz file to write.", required=True, flag_values=FLAGS)
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16"], "Dtype of the operands of matrix products.", flag_values=FLAGS
)
_HIDDEN = flags.DEFINE_list("hidden", [], "Layers, from 0, whose outputs are written as well.", flag_values=FLAGS)


def main(arguments: Sequence[str]) -> int:
  """Writes a .npz file of `logits` and, for each layer i in --hidden, its output `hidden_<i>`; returns 0."""
  parse(FLAGS, arguments)
  try:
    hidden = [int(text) for text in _HIDDEN.value]
  except ValueError as error:
    raise InputError(
      f"--hidden={','.join(_HIDDEN.value)}: this is not a list of layer numbers; give numbers such as 0,2"
    ) from error
  check_writable(_OUT.value)
  scores = score(FLAGS.model, tokens=_TOKENS.value, adapters=models.adapters(FLAGS), hidden=hidden, dtype=_DTYPE.value)
  write_scores(scores, out=_OUT.value)
  return 0
