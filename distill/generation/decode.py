"""Generates tokens after prompts: a prefill runs the prompts, then a compiled loop samples blocks of tokens."""

import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from distill.errors import InputError
from distill.generation.sampling import Sampling, draw
from distill.models.decoder import Decoder

_BLOCK = 32  # Most tokens of one compiled loop; the caller reads them after each block.
_MIN_PROMPT = 16  # Prompts are padded to a power of two, at least this, so that few lengths are compiled.


def _sample(output, *, positions, seed, sampling):
  """Draws the next token of each row from the logits of `output`; returns token ids [B], int32.

  The random key of a row depends on the seed, the index of the row and its entry in `positions` [B].
  """
  rows = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(len(positions)))
  keys = jax.vmap(jax.random.fold_in)(rows, positions)
  logits = output.readout.logits(output.hidden)[:, : output.readout.vocab_size]
  return draw(logits, keys=keys, sampling=sampling).astype(jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Texts:
  """A batch of texts between two steps of decoding.

  Attributes:
    state: Decoding state of every layer, not stacked.
    last: Last token of each text; it is not in the decoding state yet.
    positions: Position of the last token.
    ended: True for texts that have reached a stop token.
  """

  state: Any
  last: Int[Array, " B"]
  positions: Int[Array, " B"]
  ended: Bool[Array, " B"]


@functools.partial(jax.jit, static_argnames=("decoder", "length", "sampling", "dtype"))
def _start(params, prompts, stop, seed, *, decoder, length, sampling, dtype):
  """Runs the prefill on `prompts`, (padded tokens [B,T], lengths [B]), and draws the first token of each text.

  `length` is the number of positions that each text may grow to; `stop` holds the ids of the tokens that end a text.

  Returns (parameters from `decoder.unroll`, with an array for each layer; the texts including their first token).
  """
  tokens, lengths = prompts
  output, state = decoder.prefill(params, tokens=tokens, lengths=lengths, length=length, dtype=dtype)
  first = _sample(output, positions=lengths, seed=seed, sampling=sampling)
  texts = _Texts(state=decoder.unroll_state(state), last=first, positions=lengths, ended=jnp.isin(first, stop))
  return decoder.unroll(params), texts


@functools.partial(jax.jit, static_argnames=("decoder", "sampling", "dtype"), donate_argnames=("texts",))
def _block(params, texts, count, stop, seed, *, decoder, sampling, dtype):
  """Draws `count` tokens for each of `texts`, and stops early once a token of `stop` has ended every text.

  `count` is at most `_BLOCK`. Returns (tokens [B, _BLOCK], n, the texts including the drawn tokens). The scalar n is
  the number of tokens drawn for each text; they are the first n columns.
  """

  def goes_on(carry):
    step, texts, _ = carry
    return (step < count) & ~jnp.all(texts.ended)

  def body(carry):
    step, texts, drawn = carry
    output, state = decoder.step(params, state=texts.state, tokens=texts.last, positions=texts.positions, dtype=dtype)
    positions = texts.positions + 1
    tokens = _sample(output, positions=positions, seed=seed, sampling=sampling)
    texts = _Texts(state=state, last=tokens, positions=positions, ended=texts.ended | jnp.isin(tokens, stop))
    return step + 1, texts, drawn.at[:, step].set(tokens)

  drawn = jnp.zeros((len(texts.last), _BLOCK), jnp.int32)
  step, texts, drawn = jax.lax.while_loop(goes_on, body, (jnp.zeros((), jnp.int32), texts, drawn))
  return drawn, step, texts


def stream(
  decoder: Decoder,
  *,
  params: Mapping[str, Any],
  prompts: Sequence[Sequence[int]],
  max_tokens: int,
  sampling: Sampling,
  seed: int = 0,
  stop: Collection[int] = (),
  dtype: Any = jnp.float32,
) -> Iterator[list[list[int]]]:
  """Yields the tokens of `generate` as they are drawn.

  Each item is a list with one entry for each prompt: the list of tokens that were drawn since the previous item. Once a
  prompt's text has ended, its entries are empty. Arguments and errors are those of `generate`.
  """
  if max_tokens < 1:
    raise InputError(f"max_tokens={max_tokens}: the number of tokens to draw is too small; give at least 1")
  if not prompts or not all(map(len, prompts)):
    raise InputError(
      "prompts: a prompt is empty, or there is none; give at least one prompt of at least one token each"
    )
  longest = max(map(len, prompts))
  decoder.config.check_length(longest + max_tokens, what="prompt and text to draw")
  padded = max(_MIN_PROMPT, 1 << (longest - 1).bit_length())
  # Rounded up so that few lengths are compiled, except where the length changes what the model computes.
  length = longest + max_tokens if decoder.config.bound_to_length else padded + max_tokens
  tokens = np.zeros((len(prompts), min(padded, length)), np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt)] = prompt
  lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
  options = dict(seed=jnp.uint32(seed % 2**32), sampling=sampling, dtype=dtype)
  stops = jnp.asarray(sorted(stop), jnp.int32)
  unrolled, texts = _start(params, (tokens, lengths), stops, decoder=decoder, length=length, **options)
  block, done = np.asarray(texts.last)[:, None], 0
  running = [True] * len(prompts)
  while True:
    news: list[list[int]] = [[] for _ in prompts]
    for row, new in enumerate(block.tolist()):
      end = next((i for i, token in enumerate(new) if token in stop), None)
      news[row] = new[:end] if running[row] else []
      running[row] &= end is None
    yield news
    done += block.shape[1]
    if done >= max_tokens or not any(running):
      return
    # Blocks double from one token on: the first tokens come soon, and long texts take few calls.
    count = min(done + 1, _BLOCK, max_tokens - done)
    drawn, steps, texts = _block(unrolled, texts, jnp.int32(count), stops, decoder=decoder.unrolled, **options)
    block = np.asarray(drawn)[:, : int(steps)]


def generate(
  decoder: Decoder,
  *,
  params: Mapping[str, Any],
  prompts: Sequence[Sequence[int]],
  max_tokens: int,
  sampling: Sampling = Sampling(),  # noqa: B008 - frozen
  seed: int = 0,
  stop: Collection[int] = (),
  dtype: Any = jnp.float32,
) -> list[list[int]]:
  """Continues prompts with tokens drawn from a model; returns the new tokens of each prompt.

  A text depends only on the seed, on the index of its prompt and on the prompt itself. Exception: if the model's rotary
  frequencies depend on the length of a text (dynamic, longrope), all texts use the frequencies of the longest.

  Args:
    decoder: Architecture. Every call splits stacked parameters by layers. To do this once for several calls, give the
      decoder `decoder.unrolled` here, and `decoder.unroll(params)` as `params`.
    params: Stacked parameters.
    prompts: Token ids of each prompt, of any lengths, at least one token each.
    max_tokens: Maximum number of tokens to draw for each prompt, at least one.
    sampling: Distribution of the next token; by default the most likely token is taken.
    seed: Seed of the draws.
    stop: Ids of the tokens that end a text; they are not returned.
    dtype: Dtype of the operands of matrix products and of KV caches.

  Raises:
    InputError: A prompt is empty, max_tokens is below 1, or prompt and max_tokens exceed the model's learned positions.
  """
  texts: list[list[int]] = [[] for _ in prompts]
  for news in stream(
    decoder,
    params=params,
    prompts=prompts,
    max_tokens=max_tokens,
    sampling=sampling,
    seed=seed,
    stop=stop,
    dtype=dtype,
  ):
    for text, new in zip(texts, news, strict=True):
      text.extend(new)
  return texts
