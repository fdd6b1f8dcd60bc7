import jax.numpy as jnp
import pytest

from distill.errors import InputError
from distill.nn.attention import AttentionConfig, ring_positions
from distill.nn.rope import DynamicNtk, Interpolation, RopeConfig


def test_ring_positions_gives_the_position_that_each_kv_cache_slot_holds_and_is_negative_for_an_empty_slot():
  assert ring_positions(jnp.asarray([6, 1]), size=4).tolist() == [[4, 5, 6, 3], [0, 1, -2, -1]]


@pytest.mark.parametrize(
  ("rope", "bound"),
  [
    (None, False),
    (RopeConfig(scaling=Interpolation(factor=2.0)), False),
    (RopeConfig(scaling=DynamicNtk(factor=2.0, max_positions=4)), True),
  ],
  ids=["none", "interpolated", "dynamic"],
)
def test_attention_depends_on_document_length_only_if_its_rope_frequencies_do(rope, bound):
  assert AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=4, rope=rope).bound_to_length is bound


def test_gated_attention_with_a_norm_across_all_heads_is_refused():
  with pytest.raises(InputError, match="qk_norm='full' cannot be combined with gated=True; set qk_norm to 'head'"):
    AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4, rope=None, gated=True, qk_norm="full")
