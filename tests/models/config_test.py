from hypothesis import given
from hypothesis import strategies as st

from distill.models.config import AttentionConfig, LayerConfig, MlpConfig, RopeConfig, groups

KINDS = tuple(
  LayerConfig(
    mixer=AttentionConfig(num_heads=n, num_kv_heads=1, head_dim=8, rope=RopeConfig()), mlp=MlpConfig(width=16)
  )
  for n in (1, 2, 3)
)


@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=24))
def test_expanding_the_groups_of_layers_gives_back_the_layers_in_order(layers):
  repeated = {}
  for group in groups(layers):
    for repeat in range(group.repeats):
      for position, layer in enumerate(group.pattern):
        repeated[group.layer(repeat, position)] = layer
  assert [repeated[index] for index in range(len(layers))] == layers


def test_a_repeated_pattern_of_layers_is_one_group_and_the_remaining_layers_another():
  a, d, _ = KINDS
  head, rest = groups([d, d, d, a] * 3 + [d])
  assert (head.start, head.pattern, head.repeats) == (0, (d, d, d, a), 3)
  assert (rest.start, rest.pattern, rest.repeats) == (12, (d,), 1)
