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
def test_a_document_gives_the_same_alone_packed_and_decoded(family, case):
  directory, _ = reference.built(family, case)
  config, params = hf.load(directory)
  decoder = Decoder(config)
  params = decoder.stack(params)

  @jax.jit
  def apply(params, tokens, segments, positions):
    output = decoder.apply(params, tokens=tokens, segments=segments, positions=positions, dtype=jnp.float32)
    return output.hidden

  @jax.jit
  def steps(params, tokens):
    def body(state, xs):
      token, position = xs
      output, state = decoder.step(params, state=state, tokens=token, positions=position, dtype=jnp.float32)
      return state, output.hidden

    batch, length = tokens.shape
    state = decoder.init_state(params, batch=batch, length=length, dtype=jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(length)[:, None], (length, batch))
    return jax.lax.scan(body, state, (tokens.T, positions))[1].swapaxes(0, 1)

  rng = np.random.default_rng(1)
  second = jnp.asarray(rng.integers(0, 97, (1, SECOND_LENGTH)))
  alone = apply(params, second, jnp.ones_like(second), jnp.arange(SECOND_LENGTH)[None])
  scale = float(jnp.abs(alone).max())

  lengths = (FIRST_LENGTH, SECOND_LENGTH, PADDING)
  packed = jnp.concatenate([rng.integers(0, 97, (1, FIRST_LENGTH)), second, np.zeros((1, PADDING), int)], axis=1)
  segments = jnp.asarray(np.repeat([[1, 2, 0]], lengths, axis=1))
  positions = jnp.concatenate([jnp.arange(n) for n in lengths])[None]
  together = apply(params, packed, segments, positions)[:, FIRST_LENGTH : FIRST_LENGTH + SECOND_LENGTH]
  np.testing.assert_allclose(together, alone, atol=5e-5 * scale)
  np.testing.assert_allclose(steps(params, second), alone, atol=5e-5 * scale)


@pytest.mark.parametrize(("family", "case"), EVERY)
def test_prefill_of_different_lengths_and_decoding_equal_one_forward_pass(family, case):
  directory, _ = reference.built(family, case)
  config, params = hf.load(directory)
  decoder = Decoder(config)
  params = decoder.stack(params)
  steps = SECOND_LENGTH - max(PROMPTS)

  @jax.jit
  def whole(params, tokens):
    segments = jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return decoder.apply(params, tokens=tokens, segments=segments, positions=positions, dtype=jnp.float32).hidden

  @jax.jit
  def continued(params, tokens, prompts, lengths):
    first, state = decoder.prefill(params, tokens=prompts, lengths=lengths, length=SECOND_LENGTH, dtype=jnp.float32)

    def body(state, back):
      positions = lengths + back
      token = jnp.take_along_axis(tokens, positions[:, None], axis=1)[:, 0]
      output, state = decoder.step(params, state=state, tokens=token, positions=positions, dtype=jnp.float32)
      return state, output.hidden

    state, rest = jax.lax.scan(body, state, jnp.arange(steps))
    return jnp.concatenate([first.hidden[None], rest]).swapaxes(0, 1)

  tokens = jnp.asarray(np.random.default_rng(3).integers(0, 97, (len(PROMPTS), SECOND_LENGTH)))
  lengths = jnp.asarray(PROMPTS)
  padded = max(PROMPTS) + PADDING
  prompts = jnp.where(jnp.arange(padded) < lengths[:, None], tokens[:, :padded], 0)
  expected = whole(params, tokens)
  index = lengths[:, None] - 1 + jnp.arange(steps + 1)
  expected = jnp.take_along_axis(expected, index[..., None], axis=1)
  found = continued(params, tokens, prompts, lengths)
  np.testing.assert_allclose(found, expected, atol=5e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize(
  "family",
  ["llama", "qwen3_5_text", *(pytest.param(one, marks=pytest.mark.slow) for one in ("qwen3_next", "bamba", "gpt_oss"))],
)
def test_parameter_gradients_of_a_packed_document_are_the_same_as_alone(family):
  directory, _ = reference.built(*next(one for one in FIRST if one[0] == family))
  config, params = hf.load(directory)
  decoder = Decoder(config)
  params = decoder.stack({name: jnp.asarray(x) for name, x in params.items()})
  rng = np.random.default_rng(2)
  second = rng.integers(0, 97, (1, 21))
  packed = jnp.asarray(np.concatenate([rng.integers(0, 97, (1, 25)), second], axis=1))

  @jax.jit
  def gradient(params, tokens, segments, positions):
    def loss(params):
      output = decoder.apply(params, tokens=tokens, segments=segments, positions=positions, dtype=jnp.float32)
      return jnp.sum(jnp.sin(output.hidden[:, -21:]))

    return jax.grad(loss)(params)

  alone = gradient(params, jnp.asarray(second), jnp.ones((1, 21), int), jnp.arange(21)[None])
  segments = jnp.asarray(np.repeat([[1, 2]], [25, 21], axis=1))
  positions = jnp.concatenate([jnp.arange(25), jnp.arange(21)])[None]
  together = gradient(params, packed, segments, positions)
  for name, grad in alone.items():
    assert jnp.linalg.norm(together[name] - grad) <= 1e-3 * jnp.linalg.norm(grad) + 1e-6, name
