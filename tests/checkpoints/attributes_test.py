"""Keys of config.json are read, ignored where they change nothing, and refused otherwise."""

import pytest

from distill.checkpoints.attributes import Attributes
from distill.errors import InputError


def attributes(**values):
  return Attributes(values, where="here")


def test_the_error_for_a_config_json_key_that_was_not_read_names_the_key():
  have = attributes(hidden_size=4, new_switch=True)
  assert have.integer("hidden_size") == 4
  with pytest.raises(InputError, match="^here: new_switch = True is not understood"):
    have.finish()


def test_an_unread_config_json_key_is_accepted_if_it_is_null_or_off_or_does_not_change_the_output():
  attributes(
    torch_dtype="bfloat16", new_key=None, use_qk_norm=False, pruned_heads={}, quantization_config=None
  ).finish()


def test_a_config_json_key_that_was_not_read_is_refused_if_true():
  with pytest.raises(InputError, match="use_qk_norm = True"):
    attributes(use_qk_norm=True).finish()


@pytest.mark.parametrize("value", [False, None])
def test_attention_that_is_not_causal_is_refused(value):
  with pytest.raises(InputError, match="^here: is_causal = "):
    attributes(is_causal=value).finish()


def test_an_absent_or_null_key_gives_its_default_and_is_refused_if_it_has_none():
  have = attributes(rope_theta=None)
  assert have.number("rope_theta", 1e4) == 1e4 and have.flag("attention_bias") is False
  assert have.has("rope_theta") and not have.has("attention_bias")
  with pytest.raises(InputError, match="^here: vocab_size is missing"):
    have.integer("vocab_size")


def test_an_implausibly_large_number_of_layers_is_refused():
  with pytest.raises(InputError, match="^here: num_hidden_layers = 1025: expected a whole number from 1 to 1024"):
    attributes(num_hidden_layers=1025).integer("num_hidden_layers")


def test_an_activation_that_is_not_implemented_is_refused():
  assert attributes().activation() == "silu"
  with pytest.raises(InputError, match="^here: hidden_act = 'swash' is not supported; expected one of "):
    attributes(hidden_act="swash").activation()


@pytest.mark.parametrize("value", [["full"], ["full", "odd"], "full", [["full"], "full"]])
def test_layer_types_without_one_allowed_entry_for_each_layer_are_refused(value):
  with pytest.raises(
    InputError, match="^here: layer_types must be a list of 2 entries, one for each layer; each is full or sliding"
  ):
    attributes(layer_types=value).one_a_layer("layer_types", ["full"] * 2, allowed=("full", "sliding"))


def test_more_experts_per_token_than_the_model_has_are_refused():
  assert attributes(num_local_experts=4).experts(8, chosen=2) == (4, 2)
  with pytest.raises(InputError, match="num_experts_per_tok 5 is larger than the number of experts, 4"):
    attributes(num_experts=4, num_experts_per_tok=5).experts(8, chosen=2)
