"""The generate job: continues prompts and returns text."""

from collections.abc import Iterator, Sequence

from distill.data.tokenizer import load_tokenizer
from distill.errors import InputError
from distill.generation.decode import stream
from distill.generation.sampling import Sampling
from distill.jobs.loading import Adapters, Path, adapter_stack, load_model


def generate(
  model: Path,
  *,
  prompts: Sequence[str],
  adapters: Adapters = (),
  max_tokens: int = 64,
  sampling: Sampling = Sampling(),  # noqa: B008 - frozen
  seed: int = 0,
) -> list[str]:
  """Returns a model's continuation of each prompt; all prompts run in one batch.

  Args:
    model: Directory with a tokenizer, or org/name[@revision] of the hub.
    prompts: Texts to continue, none empty.
    adapters: PEFT directories or hub names, merged in this order; or the JSON file of an ordered stack.
    max_tokens: Maximum number of tokens to draw for each prompt, at least 1.
    sampling: Distribution of the next token; the default always takes the most probable one.
    seed: Random seed of the draws.

  Returns:
    The continuation of each prompt, without the prompt.

  Raises:
    InputError: The model or an adapter is wrong, a prompt is empty, or the model has too few positions.
  """
  pieces = generate_pieces(
    model, prompts=prompts, adapters=adapters, max_tokens=max_tokens, sampling=sampling, seed=seed
  )
  return ["".join(one) for one in zip(*pieces, strict=True)]


def generate_pieces(
  model: Path,
  *,
  prompts: Sequence[str],
  adapters: Adapters = (),
  max_tokens: int = 64,
  sampling: Sampling = Sampling(),  # noqa: B008 - frozen
  seed: int = 0,
) -> Iterator[list[str]]:
  """Continues prompts like `generate`, but yields the text in pieces while the tokens are drawn.

  Each item is a list with the next piece of text for every prompt; pieces may be empty. All pieces of a prompt, joined
  in order, are its continuation.

  Args:
    model: Directory with a tokenizer, or org/name[@revision] of the hub; all arguments are as in `generate`.
    prompts: Texts to continue.
    adapters: Adapters to merge.
    max_tokens: Maximum number of tokens to draw for each prompt.
    sampling: Distribution of the next token.
    seed: Random seed of the draws.

  Raises:
    InputError: As in `generate`.
  """
  decoder, params = load_model(model, stack=adapter_stack(adapters))
  tokenizer = load_tokenizer(model)
  rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
  if not all(rows):
    raise InputError("prompt: one of the prompts is empty; give at least one character")
  longest = max(map(len, rows))
  if longest + max_tokens > decoder.config.max_positions:
    raise InputError(
      f"max_tokens={max_tokens}: the longest prompt has {longest} tokens, and both together exceed the model's "
      f"{decoder.config.max_positions} positions; lower max_tokens, or shorten the prompt"
    )
  tokens: list[list[int]] = [[] for _ in rows]
  shown = [""] * len(rows)
  for news in stream(
    decoder,
    params=params,
    prompts=rows,
    max_tokens=max_tokens,
    sampling=sampling,
    seed=seed,
    stop={tokenizer.eos_token_id} - {None},
  ):
    for row, new in zip(tokens, news, strict=True):
      row.extend(new)
    texts = [str(tokenizer.decode(row)) for row in tokens]
    # A replacement character at the end is half of a character whose other bytes are still to come.
    whole = [
      before if "\N{REPLACEMENT CHARACTER}" in text[-1:] else text for text, before in zip(texts, shown, strict=True)
    ]
    yield [text[len(before) :] for text, before in zip(whole, shown, strict=True)]
    shown = whole
  yield [text[len(before) :] for text, before in zip(texts, shown, strict=True)]
