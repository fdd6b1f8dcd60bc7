"""Draws the next token of each row from the model's logits."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from distill.errors import InputError

_ONE = 0x3F800000  # The bits of 1.0 in float32.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """Sampling settings for the next token. Temperature is applied first, then top-k, then top-p (nucleus).

  Attributes:
    temperature: Divides the logits; 0 takes the most likely token.
    top_k: Number of most likely tokens to draw from; 0 for all.
    top_p: Nucleus sampling: draws from the smallest token set whose probability reaches top_p, above 0 and at most 1.

  Raises:
    InputError: A value is out of range.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if not 0 <= self.temperature < math.inf:
      raise InputError(f"temperature={self.temperature}: the temperature must be a finite number of at least 0")
    if self.top_k < 0:
      raise InputError(
        f"top_k={self.top_k}: top_k must not be negative; give the number of most likely tokens to draw from, or 0 for "
        "all tokens"
      )
    if not 0 < self.top_p <= 1:
      raise InputError(f"top_p={self.top_p}: top_p must be a probability above 0 and at most 1")


def nucleus(logits: Float[Array, "*B V"], top_p: float) -> Bool[Array, "*B V"]:
  """Returns a mask of the nucleus: the smallest set of most likely tokens whose probability reaches `top_p`.

  Tokens as likely as the least likely token of the set are included (Holtzman et al. 2019, 1904.09751). The probability
  of that token is found by bisection over the bits of a float32, which sort like the floats. The bisection takes 30
  sums over the vocabulary; sorting the vocabulary takes far longer.
  """
  probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)

  def halve(_, bounds):
    low, high = bounds
    middle = low + (high - low) // 2
    threshold = jax.lax.bitcast_convert_type(middle, jnp.float32)
    mass = jnp.sum(jnp.where(probs >= threshold, probs, 0.0), axis=-1, keepdims=True)
    reached = mass >= top_p
    return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

  shape = (*logits.shape[:-1], 1)
  bounds = jnp.zeros(shape, jnp.int32), jnp.full(shape, _ONE + 1, jnp.int32)
  low, _ = jax.lax.fori_loop(0, 30, halve, bounds)
  return probs >= jax.lax.bitcast_convert_type(low, jnp.float32)


def draw(logits: Float[Array, "B V"], *, keys: Key[Array, " B"], sampling: Sampling) -> Int[Array, " B"]:
  """Draws one token id for each row; it depends only on the logits and the random key of that row."""
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1)
  logits, ids = logits / sampling.temperature, None
  if sampling.top_k:
    logits, ids = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))
  if sampling.top_p < 1:
    logits = jnp.where(nucleus(logits, sampling.top_p), logits, -jnp.inf)
  chosen = jax.vmap(jax.random.categorical)(keys, logits)
  return chosen if ids is None else jnp.take_along_axis(ids, chosen[:, None], axis=-1)[:, 0]
