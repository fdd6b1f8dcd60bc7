"""distill generate: continue a prompt."""

import sys
from collections.abc import Sequence

from absl import flags

from distill.cli import models
from distill.cli.parsing import parse
from distill.data.tokenizer import load_tokenizer
from distill.errors import InputError
from distill.generate.sample import sample

FLAGS = flags.FlagValues()
models.define(FLAGS)
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.", required=True, flag_values=FLAGS)
_MAX = flags.DEFINE_integer("max_tokens", 64, "Most tokens to draw.", lower_bound=1, flag_values=FLAGS)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest.", lower_bound=0.0, flag_values=FLAGS)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.", flag_values=FLAGS)


def main(arguments: Sequence[str]) -> int:
  """Prints the continuation as it is drawn."""
  parse(FLAGS, arguments)
  directory = FLAGS.model
  decoder, params = models.load(directory, stack=models.stack(FLAGS))
  tokenizer = load_tokenizer(directory)
  prompt = tokenizer(_PROMPT.value, add_special_tokens=False)["input_ids"]
  if not prompt:
    raise InputError("--prompt: empty; give some text")
  if len(prompt) + _MAX.value > decoder.config.max_positions:
    raise InputError(
      f"--max_tokens={_MAX.value}: with the prompt's {len(prompt)} tokens more than the model's "
      f"{decoder.config.max_positions} positions"
    )
  drawn: list[int] = []
  shown = ""
  for token in sample(
    decoder,
    params=params,
    prompt=prompt,
    max_tokens=_MAX.value,
    temperature=_TEMPERATURE.value,
    seed=_SEED.value,
    stop={tokenizer.eos_token_id},
  ):
    drawn.append(token)
    text = str(tokenizer.decode(drawn))
    if not text.endswith("\N{REPLACEMENT CHARACTER}"):
      sys.stdout.write(text[len(shown) :])
      sys.stdout.flush()
      shown = text
  print(str(tokenizer.decode(drawn))[len(shown) :])
  return 0
