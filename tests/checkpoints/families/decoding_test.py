"""Decoding token by token, and documents packed into one row, in every family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.checkpoints import hf
from distill.models.decoder import Decoder
from tests.checkpoints.families import reference
from tests.checkpoints.families.cases import FIRST, NAMES

EVERY = [pytest.param(*one, id="-".join(one), marks=() if one in FIRST else pytest.mark.slow) for one in NAMES]
FIRST_LENGTH, SECOND_LENGTH, PADDING = 30, 36, 4
PROMPTS = (25, 9, 1, 17)  # Beyond every window, and within.


@pytest.mark.parametrize(("family", "case"), EVERY)
def test_a_document_gives_equal_outputs_alone_and_packed_with_others_and_decoded_from_any_prompt(family, case):
  directory, _ = reference.built(family, case)
  config, params = hf.load(directory)
  decoder = Decoder(config)
  params = decoder.stack(params)

  @jax.jit
  def whole(params, tokens, segments, positions):
    return decoder.apply(params, tokens=tokens, segments=segments, positions=positions, dtype=jnp.float32).hidden

  def one_by_one(params, state, tokens, positions):
    """Decodes tokens [T,B] at their positions and returns hidden states [B,T,D]."""

    def body(state, xs):
      token, position = xs
      output, state = decoder.step(params, state=state, tokens=token, positions=position, dtype=jnp.float32)
      return state, output.hidden

    return jax.lax.scan(body, state, (tokens, positions))[1].swapaxes(0, 1)

  @jax.jit
  def from_the_start(params, tokens):
    batch, length = tokens.shape
    state = decoder.init_state(params, batch=batch, length=length, dtype=jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(length)[:, None], (length, batch))
    return one_by_one(params, state, tokens.T, positions)

  @jax.jit
  def from_prompts(params, tokens, prompts, lengths):
    first, state = decoder.prefill(params, tokens=prompts, lengths=lengths, length=SECOND_LENGTH, dtype=jnp.float32)
    positions = lengths[:, None] + jnp.arange(SECOND_LENGTH - max(PROMPTS))[None, :]
    following = jnp.take_along_axis(tokens, positions, axis=1)
    rest = one_by_one(params, state, following.T, positions.T)
    return jnp.concatenate([first.hidden[:, None], rest], axis=1)

  # One row of two documents and padding, and below it documents that are alone: one shape, compiled once.
  total = FIRST_LENGTH + SECOND_LENGTH + PADDING
  tokens = np.random.default_rng(1).integers(0, 97, (1 + len(PROMPTS), total))
  segments = np.zeros_like(tokens)
  segments[0] = np.repeat([1, 2, 0], (FIRST_LENGTH, SECOND_LENGTH, PADDING))
  segments[1:, :SECOND_LENGTH] = 1
  positions = np.broadcast_to(np.arange(total) % SECOND_LENGTH, tokens.shape).copy()
  positions[0, FIRST_LENGTH:] = np.arange(total - FIRST_LENGTH) % SECOND_LENGTH
  second = slice(FIRST_LENGTH, FIRST_LENGTH + SECOND_LENGTH)
  tokens[1, :SECOND_LENGTH] = tokens[0, second]
  found = whole(params, *(jnp.asarray(x, jnp.int32) for x in (tokens, segments, positions)))
  alone = found[1:, :SECOND_LENGTH]
  tolerance = 5e-5 * float(jnp.abs(alone).max())
  np.testing.assert_allclose(found[0, second], alone[0], atol=tolerance)

  documents = jnp.asarray(tokens[1:, :SECOND_LENGTH], jnp.int32)
  np.testing.assert_allclose(from_the_start(params, documents[:1]), alone[:1], atol=tolerance)

  lengths = jnp.asarray(PROMPTS)
  padded = max(PROMPTS) + PADDING
  prompts = jnp.where(jnp.arange(padded)[None, :] < lengths[:, None], documents[:, :padded], 0)
  index = lengths[:, None] - 1 + jnp.arange(SECOND_LENGTH - max(PROMPTS) + 1)[None, :]
  expected = jnp.take_along_axis(alone, index[..., None], axis=1)
  np.testing.assert_allclose(from_prompts(params, documents, prompts, lengths), expected, atol=tolerance)


@pytest.mark.parametrize(
  "family",
  ["llama", "qwen3_5_text", *(pytest.param(one, marks=pytest.mark.slow) for one in ("qwen3_next", "bamba", "gpt_oss"))],
)
def test_parameter_gradients_of_a_packed_document_are_the_same_as_alone(family):
  directory, _ = reference.built(*next(one for one in FIRST if one[0] == family))
  config, params = hf.load(directory)
  decoder = Decoder(config)
  params = decoder.stack({name: jnp.asarray(x) for name, x in params.items()})
  # The same document behind another one and behind padding: one shape, compiled once.
  tokens = jnp.asarray(np.random.default_rng(2).integers(0, 97, (2, 25 + 21)), jnp.int32)
  tokens = tokens.at[1, 25:].set(tokens[0, 25:])
  segments = jnp.asarray(np.repeat([[1, 2], [0, 2]], [25, 21], axis=1), jnp.int32)
  positions = jnp.concatenate([jnp.arange(25), jnp.arange(21)])[None]

  @jax.jit
  def gradient(params, tokens, segments):
    def loss(params):
      output = decoder.apply(params, tokens=tokens, segments=segments, positions=positions, dtype=jnp.float32)
      return jnp.sum(jnp.sin(output.hidden[:, -21:]))

    return jax.grad(loss)(params)

  together, alone = (gradient(params, tokens[row : row + 1], segments[row : row + 1]) for row in range(2))
  for name, grad in alone.items():
    assert jnp.linalg.norm(together[name] - grad) <= 1e-3 * jnp.linalg.norm(grad) + 1e-6, name
