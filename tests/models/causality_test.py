"""Tests of causality by gradients: a position depends only on its document up to itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.models.config import (
  AttentionConfig,
  DecoderConfig,
  GatedDeltaConfig,
  LayerConfig,
  Mamba2Config,
  MlpConfig,
  MoeConfig,
  RopeConfig,
)
from distill.models.decoder import Decoder

SEGMENTS = np.repeat([1, 2, 3, 0], (3, 66, 2, 1))  # One document crosses the border between two chunks.
LENGTH = len(SEGMENTS)
ATTENTION = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4, rope=RopeConfig())
LAYERS = {
  "attention": LayerConfig(mixer=ATTENTION, mlp=MlpConfig(width=8)),
  "windowed attention": LayerConfig(
    mixer=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4, rope=None, window=5, sinks=True), mlp=None
  ),
  "gated delta": LayerConfig(
    mixer=GatedDeltaConfig(num_key_heads=1, num_value_heads=2, key_head_dim=4, value_head_dim=4), mlp=None
  ),
  "Mamba-2": LayerConfig(mixer=Mamba2Config(num_heads=2, head_dim=4, state_size=4), mlp=None),
  "experts": LayerConfig(mixer=ATTENTION, mlp=MoeConfig(width=8, num_experts=4, top_k=2)),
}


def influence(layer):
  """Returns [T,S]: the largest gradient of the output at position t with respect to the embedding at s."""
  decoder = Decoder(DecoderConfig(family="toy", vocab_size=LENGTH, width=8, layers=(layer,)))
  params = decoder.init(jax.random.key(0))
  # Every position has a token of its own, so that a row of the table is the input of one position.
  tokens = jnp.arange(LENGTH)[None]
  positions = jnp.asarray(np.concatenate([np.arange(count) for count in np.bincount(SEGMENTS)[[1, 2, 3, 0]]]))[None]
  direction = jax.random.normal(jax.random.key(1), (8,))

  @jax.jit
  @jax.jacrev
  def gradients(table):
    output = decoder.apply(
      {**params, "embed.table": table},
      tokens=tokens,
      segments=jnp.asarray(SEGMENTS)[None],
      positions=positions,
      dtype=jnp.float32,
    )
    return output.hidden[0] @ direction

  return np.abs(gradients(params["embed.table"])).max(axis=-1)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_a_position_depends_only_on_itself_and_earlier_positions_of_its_own_document(layer):
  found, order = influence(layer)[SEGMENTS > 0], np.arange(LENGTH)
  back = (order[:, None] - order)[SEGMENTS > 0]
  same = (SEGMENTS[:, None] == SEGMENTS)[SEGMENTS > 0]
  window = getattr(layer.mixer, "window", None) or LENGTH
  assert (found[same & (back >= 0) & (back < window)] > 0).all()
  assert (found[(back < 0) | (back >= window)] == 0).all()
  # Decays of recurrences are differences of sums over a chunk, in which earlier documents cancel up to rounding.
  rounding = LENGTH * np.finfo(np.float32).eps * found.max(axis=1, keepdims=True)
  assert (np.where(same, 0, found) <= rounding).all()
