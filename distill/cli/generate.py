"""distill generate: prints a model's continuations of prompts."""

from collections.abc import Sequence

from absl import flags

from distill.cli import models
from distill.cli.parsing import parse
from distill.errors import InputError
from distill.generation.sampling import Sampling
from distill.jobs.generate import generate_pieces

FLAGS = flags.FlagValues()
models.define(FLAGS)
_PROMPT = flags.DEFINE_multi_string(
  "prompt", None, "Text to continue; repeat the flag to continue several together.", required=True, flag_values=FLAGS
)
_MAX = flags.DEFINE_integer("max_tokens", 64, "Most tokens to draw.", lower_bound=1, flag_values=FLAGS)
_TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.0, "Divides the logits; 0 takes the most probable token.", flag_values=FLAGS
)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from this many most probable tokens; 0 for all.", flag_values=FLAGS)
_TOP_P = flags.DEFINE_float(
  "top_p", 1.0, "Draw from the smallest set of tokens whose probability reaches this.", flag_values=FLAGS
)
_SEED = flags.DEFINE_integer("seed", 0, "Random seed of the draws.", flag_values=FLAGS)


def main(arguments: Sequence[str]) -> int:
  """Prints the continuation of each prompt in order, the first one while it is generated; returns the exit code."""
  parse(FLAGS, arguments)
  sampling = Sampling(temperature=_TEMPERATURE.value, top_k=_TOP_K.value, top_p=_TOP_P.value)
  if not sampling.temperature and (sampling.top_k or sampling.top_p < 1):
    raise InputError(
      "--top_k and --top_p: have no effect at temperature 0, which always takes the most probable token; raise "
      "--temperature, or leave them out"
    )
  rest: list[list[str]] = []
  for first, *others in generate_pieces(
    FLAGS.model,
    prompts=_PROMPT.value,
    adapters=models.adapters(FLAGS),
    max_tokens=_MAX.value,
    sampling=sampling,
    seed=_SEED.value,
  ):
    print(first, end="", flush=True)
    rest.append(others)
  print()
  for pieces in zip(*rest, strict=True):
    print("".join(pieces))
  return 0
