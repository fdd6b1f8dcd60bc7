"""Continuing prompts: filled into the caches at once, then drawn in blocks of tokens that Python does not interrupt."""

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill.errors import InputError
from distill.generate.sampling import Sampling, draw
from distill.models.decoder import Decoder

_BLOCK = 32  # Tokens between two looks at what was drawn.
_SHORTEST = 16  # Prompts are padded to a power of two, at least this: each length is compiled for itself.


def _draw(output, *, positions, seed, sampling):
  """A token a row from keys of (seed, row, position)."""
  rows = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(len(positions)))
  keys = jax.vmap(jax.random.fold_in)(rows, positions)
  logits = output.readout.logits(output.hidden)[:, : output.readout.vocab_size]
  return draw(logits, keys=keys, sampling=sampling).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("decoder", "length", "sampling", "dtype"))
def _start(params, tokens, lengths, seed, *, decoder, length, sampling, dtype):
  """(first token of each row, parameters and caches of single layers)."""
  output, cache = decoder.prefill(params, tokens=tokens, lengths=lengths, length=length, dtype=dtype)
  first = _draw(output, positions=lengths, seed=seed, sampling=sampling)
  return first, decoder.unroll(params), decoder.unroll_cache(cache)


@functools.partial(jax.jit, static_argnames=("decoder", "sampling", "dtype"), donate_argnames=("cache",))
def _block(params, cache, tokens, *, positions, ended, count, stop, seed, decoder, sampling, dtype):
  """Up to `count` more tokens of each row, fewer if all have ended: ([B,_BLOCK], how many, cache, ended)."""
  drawn = jnp.zeros((len(tokens), _BLOCK), jnp.int32)

  def goes_on(carry):
    step, _, _, ended, _ = carry
    return (step < count) & ~jnp.all(ended)

  def body(carry):
    step, cache, tokens, ended, drawn = carry
    output, cache = decoder.step(params, cache=cache, tokens=tokens, positions=positions + step, dtype=dtype)
    tokens = _draw(output, positions=positions + step + 1, seed=seed, sampling=sampling)
    return step + 1, cache, tokens, ended | jnp.isin(tokens, stop), drawn.at[:, step].set(tokens)

  start = (jnp.zeros((), jnp.int32), cache, tokens, ended | jnp.isin(tokens, stop), drawn)
  step, cache, _, ended, drawn = jax.lax.while_loop(goes_on, body, start)
  return drawn, step, cache, ended


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
  """What `generate` draws, as it is drawn: the next few tokens of every row, none for a row that has ended."""
  if not prompts or not all(map(len, prompts)):
    raise InputError("prompts: expected at least one, of at least one token each")
  longest = max(map(len, prompts))
  decoder.check_length(longest + max_tokens, what="prompt and text to draw")
  padded = max(_SHORTEST, 1 << (longest - 1).bit_length())
  # Where a text's length decides what the model computes, it is not rounded up.
  length = longest + max_tokens if decoder.config.bound_to_length else padded + max_tokens
  tokens = np.zeros((len(prompts), min(padded, length)), np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt)] = prompt
  lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
  how = dict(seed=jnp.uint32(seed % 2**32), sampling=sampling, dtype=dtype)
  last, single, cache = _start(params, tokens, lengths, decoder=decoder, length=length, **how)
  stops, ended = jnp.asarray(sorted(stop), jnp.int32), jnp.zeros(len(prompts), bool)
  block, done = np.asarray(last)[:, None], 0
  going = [True] * len(prompts)
  while True:
    news: list[list[int]] = [[] for _ in prompts]
    for row, new in enumerate(block.tolist()):
      end = next((i for i, token in enumerate(new) if token in stop), None)
      news[row] = new[:end] if going[row] else []
      going[row] &= end is None
    yield news
    done += block.shape[1]
    if done >= max_tokens or not any(going):
      return
    # Blocks grow with what there is to read: one token, then two, then twice as many each time.
    count = min(done + 1, _BLOCK, max_tokens - done)
    at = dict(positions=lengths + np.int32(done - 1), count=jnp.int32(count), stop=stops)
    drawn, steps, cache, ended = _block(single, cache, last, ended=ended, decoder=decoder.unrolled, **at, **how)
    block = np.asarray(drawn)[:, : int(steps)]
    last = block[:, -1]


def generate(
  decoder: Decoder,
  *,
  params: Mapping[str, Any],
  prompts: Sequence[Sequence[int]],
  max_tokens: int,
  temperature: float = 0.0,
  top_k: int = 0,
  top_p: float = 1.0,
  seed: int = 0,
  stop: Collection[int] = (),
  dtype: Any = jnp.float32,
) -> list[list[int]]:
  """The tokens that follow each prompt; a row's draws depend on the seed, its number and its own text alone.

  Args:
    decoder: Architecture. One that is `unrolled`, with parameters that are, saves cutting them apart in every call.
    params: Its parameters.
    prompts: Of any lengths, at least one token each.
    max_tokens: Most tokens to draw for each, at least one.
    temperature: Divides the logits; 0 takes the likeliest token.
    top_k: Only this many of the likeliest tokens; 0 for all.
    top_p: Only the likeliest tokens that reach this probability together.
    seed: Of the draws.
    stop: Tokens that end a text; they are not in it.
    dtype: Dtype of the operands and caches.

  Raises:
    InputError: A prompt is empty, a value is out of its bounds, or the model has no embedding for so many positions.
  """
  sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
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
