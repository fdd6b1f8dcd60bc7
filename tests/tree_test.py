import jax
import pytest
from flax import nnx

from distill import tree
from distill.errors import InputError
from distill.nn.linear import Linear
from distill.nn.param import Init


def test_unflatten_inverts_flatten_for_the_state_of_a_module():
  module = Linear(Init(jax.random.key(0)), shape=(3, 5), axes=(None, None), use_bias=True)
  _, state = nnx.split(module)
  params = tree.flatten(state)
  assert sorted(params) == ["bias", "kernel"]
  doubled = tree.flatten(tree.unflatten(state, {name: 2 * value for name, value in params.items()}))
  assert (doubled["kernel"] == 2 * params["kernel"]).all()


def test_first_match_uses_the_first_matching_rule_and_refuses_a_parameter_without_one():
  rules = [(r".*\.bias", 0.0), (r"mlp\..*", 1.0)]
  assert tree.first_match(rules, "mlp.up.bias", what="decay") == 0.0
  assert tree.first_match(rules, "mlp.up.kernel", what="decay") == 1.0
  with pytest.raises(InputError, match=r"decay: no rule covers the parameter 'norm.scale'"):
    tree.first_match(rules, "norm.scale", what="decay")
