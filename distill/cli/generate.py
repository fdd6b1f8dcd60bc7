"""distill generate: continue prompts."""

import sys
from collections.abc import Sequence

from absl import flags

from distill.cli import models
from distill.cli.parsing import parse
from distill.data.tokenizer import load_tokenizer
from distill.errors import InputError
from distill.generate.decode import stream
from distill.generate.sampling import Sampling

FLAGS = flags.FlagValues()
models.define(FLAGS)
_PROMPT = flags.DEFINE_multi_string(
  "prompt", None, "Text to continue; several are continued together.", required=True, flag_values=FLAGS
)
_MAX = flags.DEFINE_integer("max_tokens", 64, "Most tokens to draw.", lower_bound=1, flag_values=FLAGS)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest.", flag_values=FLAGS)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Only so many of the likeliest; 0 for all.", flag_values=FLAGS)
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Only the likeliest of this probability together.", flag_values=FLAGS)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.", flag_values=FLAGS)


def main(arguments: Sequence[str]) -> int:
  """Prints the continuations one after another, the first as it is drawn."""
  parse(FLAGS, arguments)
  sampling = Sampling(temperature=_TEMPERATURE.value, top_k=_TOP_K.value, top_p=_TOP_P.value)
  if not sampling.temperature and (sampling.top_k or sampling.top_p < 1):
    raise InputError("--top_k and --top_p: no use at temperature 0, which takes the likeliest; give --temperature")
  directory = FLAGS.model
  decoder, params = models.load(directory, stack=models.stack(FLAGS))
  tokenizer = load_tokenizer(directory)
  prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in _PROMPT.value]
  if not all(prompts):
    raise InputError("--prompt: empty; give some text")
  longest = max(map(len, prompts))
  if longest + _MAX.value > decoder.config.max_positions:
    raise InputError(
      f"--max_tokens={_MAX.value}: with the prompt's {longest} tokens more than the model's "
      f"{decoder.config.max_positions} positions"
    )
  texts: list[list[int]] = [[] for _ in prompts]
  shown = ""
  for news in stream(
    decoder,
    params=params,
    prompts=prompts,
    max_tokens=_MAX.value,
    sampling=sampling,
    seed=_SEED.value,
    stop={tokenizer.eos_token_id} - {None},
  ):
    for text, new in zip(texts, news, strict=True):
      text.extend(new)
    first = str(tokenizer.decode(texts[0]))
    if not first.endswith("\N{REPLACEMENT CHARACTER}"):
      sys.stdout.write(first[len(shown) :])
      sys.stdout.flush()
      shown = first
  print(str(tokenizer.decode(texts[0]))[len(shown) :])
  for text in texts[1:]:
    print(tokenizer.decode(text))
  return 0
