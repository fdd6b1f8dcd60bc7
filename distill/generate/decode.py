"""Continuing prompts: filled into the caches at once, then drawn in blocks of tokens that Python does not interrupt."""

import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows:
  """Where a batch of texts stands.

  Attributes:
    cache: Of single layers.
    last: The last token of each row, which is not in the cache yet.
    positions: Its position.
    ended: Whether a row has come to a stop.
  """

  cache: Any
  last: Int[Array, " B"]
  positions: Int[Array, " B"]
  ended: Bool[Array, " B"]


@functools.partial(jax.jit, static_argnames=("decoder", "length", "sampling", "dtype"))
def _start(params, tokens, lengths, stop, seed, *, decoder, length, sampling, dtype):
  """(parameters of single layers, rows with their first token)."""
  output, cache = decoder.prefill(params, tokens=tokens, lengths=lengths, length=length, dtype=dtype)
  first = _draw(output, positions=lengths, seed=seed, sampling=sampling)
  rows = _Rows(cache=decoder.unroll_cache(cache), last=first, positions=lengths, ended=jnp.isin(first, stop))
  return decoder.unroll(params), rows


@functools.partial(jax.jit, static_argnames=("decoder", "sampling", "dtype"), donate_argnames=("rows",))
def _block(params, rows, count, stop, seed, *, decoder, sampling, dtype):
  """Up to `count` more tokens of each row, fewer if all have ended: ([B,_BLOCK], how many, rows)."""

  def goes_on(carry):
    step, rows, _ = carry
    return (step < count) & ~jnp.all(rows.ended)

  def body(carry):
    step, rows, drawn = carry
    output, cache = decoder.step(params, cache=rows.cache, tokens=rows.last, positions=rows.positions, dtype=dtype)
    positions = rows.positions + 1
    tokens = _draw(output, positions=positions, seed=seed, sampling=sampling)
    rows = _Rows(cache=cache, last=tokens, positions=positions, ended=rows.ended | jnp.isin(tokens, stop))
    return step + 1, rows, drawn.at[:, step].set(tokens)

  drawn = jnp.zeros((len(rows.last), _BLOCK), jnp.int32)
  step, rows, drawn = jax.lax.while_loop(goes_on, body, (jnp.zeros((), jnp.int32), rows, drawn))
  return drawn, step, rows


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
  if max_tokens < 1:
    raise InputError(f"max_tokens={max_tokens}: expected at least 1")
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
  stops = jnp.asarray(sorted(stop), jnp.int32)
  single, rows = _start(params, tokens, lengths, stops, decoder=decoder, length=length, **how)
  block, done = np.asarray(rows.last)[:, None], 0
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
    drawn, steps, rows = _block(single, rows, jnp.int32(count), stops, decoder=decoder.unrolled, **how)
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
  """The tokens that follow each prompt; a row's draws depend on the seed, its number and its own text alone.

  But where rotary frequencies depend on a text's length (dynamic, longrope): all rows have those of the longest.

  Args:
    decoder: Architecture. One that is `unrolled`, with parameters that are, saves cutting them apart in every call.
    params: Its parameters.
    prompts: Of any lengths, at least one token each.
    max_tokens: Most tokens to draw for each, at least one.
    sampling: How a token is drawn; unless given, the likeliest is taken.
    seed: Of the draws.
    stop: Tokens that end a text; they are not in it.
    dtype: Dtype of the operands and caches.

  Raises:
    InputError: A prompt is empty, max_tokens below 1, or the model has no embedding for so many positions.
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
