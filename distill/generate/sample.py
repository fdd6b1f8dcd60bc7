"""Sampling from a decoder, token by token, with caches."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distill.models.decoder import Decoder


def sample(
  decoder: Decoder,
  *,
  params: Mapping[str, Any],
  prompt: Sequence[int],
  max_tokens: int,
  temperature: float = 0.0,
  seed: int = 0,
  stop: Collection[int] = (),
  dtype: Any = jnp.float32,
) -> Iterator[int]:
  """Token ids after `prompt`, as they are drawn; the same for the same seed.

  Args:
    decoder: Architecture.
    params: Stacked parameters.
    prompt: At least one token.
    max_tokens: Most tokens to draw.
    temperature: Divides the logits; 0 takes the likeliest token.
    seed: Of the draws.
    stop: Tokens that end the text; they are not yielded.
    dtype: Dtype of the operands and caches.
  """

  @jax.jit
  def step(params, cache, token, position, key):
    output, cache = decoder.step(params, cache=cache, tokens=token[None], positions=position[None], dtype=dtype)
    logits_V = output.readout.logits(output.hidden)[0, : output.readout.vocab_size]
    if temperature > 0:
      return jax.random.categorical(key, logits_V / temperature), cache
    return jnp.argmax(logits_V), cache

  cache = decoder.init_cache(params, batch=1, length=len(prompt) + max_tokens, dtype=dtype)
  root, token = jax.random.key(seed), None
  for position in range(len(prompt) + max_tokens - 1):
    current = prompt[position] if position < len(prompt) else token
    key = jax.random.fold_in(root, position)
    drawn, cache = step(params, cache, jnp.asarray(current, jnp.int32), jnp.asarray(position, jnp.int32), key)
    if position >= len(prompt) - 1:
      token = int(drawn)
      if token in stop:
        return
      yield token
