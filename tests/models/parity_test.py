"""The decoder against transformers, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from distill.models import hf
from distill.models.decoder import Decoder

SMALL = dict(vocab_size=97, hidden_size=48, intermediate_size=80, max_position_embeddings=128)
LLAMA3 = dict(
  rope_type="llama3",
  rope_theta=5e4,
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=32,
)
CASES = {
  "llama": dict(model_type="llama", num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, **SMALL),
  "llama3-tied-biased": dict(
    model_type="llama",
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    attention_bias=True,
    mlp_bias=True,
    tie_word_embeddings=True,
    rope_parameters=LLAMA3,
    **SMALL,
  ),
  "qwen3_5": dict(
    model_type="qwen3_5_text",
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=16,
    **SMALL,
  ),
}


@pytest.fixture(scope="module", params=list(CASES))
def saved(request, tmp_path_factory):
  """(directory, transformers model with every parameter drawn at random)."""
  torch.manual_seed(0)
  fields = dict(CASES[request.param])
  config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
  model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter += 0.1 * torch.randn_like(parameter)
  directory = tmp_path_factory.mktemp(request.param)
  model.save_pretrained(directory)
  return directory, model


def ours(directory, tokens, **kwargs):
  config, params = hf.load(directory)
  decoder = Decoder(config)
  rows = jnp.asarray(tokens)
  return decoder.apply(
    decoder.stack(params),
    tokens=rows,
    segments=kwargs.pop("segments", jnp.ones_like(rows)),
    positions=kwargs.pop("positions", jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)),
    dtype=jnp.float32,
    **kwargs,
  )


def test_logits_and_hidden_states_equal_transformers(saved):
  directory, model = saved
  tokens = np.random.default_rng(0).integers(0, 97, (2, 77))
  with torch.no_grad():
    expected = model(torch.tensor(tokens), output_hidden_states=True)
  output = ours(directory, tokens, capture=(0, 1))
  logits = output.readout.logits(output.hidden)
  # Both walk the delta rule in float32 chunks of their own, whose rounding differs more than that of attention.
  tolerance = 1e-4 if model.config.model_type == "qwen3_5_text" else 1e-5
  np.testing.assert_allclose(logits, expected.logits.numpy(), atol=tolerance * np.abs(expected.logits.numpy()).max())
  for i in range(2):
    theirs = expected.hidden_states[i + 1].numpy()
    if i + 1 < model.config.num_hidden_layers:
      np.testing.assert_allclose(output.captured[i], theirs, atol=tolerance * np.abs(theirs).max())


def test_a_packed_document_is_the_same_as_alone(saved):
  directory, _ = saved
  rng = np.random.default_rng(1)
  first, second = rng.integers(0, 97, (1, 70)), rng.integers(0, 97, (1, 41))
  packed = np.concatenate([first, second, np.zeros((1, 9), int)], axis=1)
  segments = jnp.asarray(np.repeat([[1, 2, 0]], [70, 41, 9], axis=1))
  positions = jnp.asarray(np.concatenate([np.arange(70), np.arange(41), np.zeros(9, int)])[None])
  together = ours(directory, packed, segments=segments, positions=positions).hidden[:, 70:111]
  alone = ours(directory, second).hidden
  np.testing.assert_allclose(together, alone, atol=2e-5 * float(jnp.abs(alone).max()))


def test_parameter_gradients_of_a_packed_document_are_the_same_as_alone(saved):
  directory, _ = saved
  config, params = hf.load(directory)
  decoder = Decoder(config)
  params = decoder.stack({name: jnp.asarray(x) for name, x in params.items()})
  rng = np.random.default_rng(2)
  second = rng.integers(0, 97, (1, 21))
  packed = jnp.asarray(np.concatenate([rng.integers(0, 97, (1, 70)), second], axis=1))

  def loss(params, tokens, segments, positions):
    output = decoder.apply(params, tokens=tokens, segments=segments, positions=positions, dtype=jnp.float32)
    return jnp.sum(jnp.sin(output.hidden[:, -21:]))

  alone = jax.grad(loss)(params, jnp.asarray(second), jnp.ones((1, 21), int), jnp.arange(21)[None])
  segments = jnp.asarray(np.repeat([[1, 2]], [70, 21], axis=1))
  positions = jnp.concatenate([jnp.arange(70), jnp.arange(21)])[None]
  together = jax.grad(loss)(params, packed, segments, positions)
  for name, grad in alone.items():
    assert jnp.linalg.norm(together[name] - grad) <= 1e-3 * jnp.linalg.norm(grad) + 1e-6, name


def test_hf_to_hf_is_bit_equal(saved, tmp_path):
  directory, model = saved
  config, params = hf.load(directory)
  hf.save(tmp_path / "copy", config=config, params=params)
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype=torch.float32)
  for name, tensor in model.state_dict().items():
    assert torch.equal(tensor, again.state_dict()[name]), name
  assert (tmp_path / "copy/model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()
