import dataclasses

import numpy as np
import pytest

from distill.models.config import MlpConfig, MoeConfig
from tests.initialise.students import LAYER, TEACHER, assert_equal_logits, random, start


def test_mlp_neurons_with_zero_output_are_removed_first():
  teacher = random(TEACHER, 0)
  gone = [0, 5, 23]
  for name, x in teacher.items():
    if name.endswith("up.kernel"):
      x = np.array(x)
      x[:, gone] = 0.0
      teacher[name] = x
  config = dataclasses.replace(TEACHER, layers=(dataclasses.replace(LAYER, mlp=MlpConfig(width=21)),) * 3)
  made = start(TEACHER, teacher, config)
  np.testing.assert_array_equal(made.retained[1].neurons, np.setdiff1d(np.arange(24), gone))
  assert_equal_logits(config, made.params, TEACHER, teacher)


def test_an_mlp_wider_than_the_teachers_starts_with_the_teachers_outputs():
  config = dataclasses.replace(TEACHER, layers=(dataclasses.replace(LAYER, mlp=MlpConfig(width=40)),) * 3)
  teacher = random(TEACHER, 0)
  made = start(TEACHER, teacher, config)
  assert_equal_logits(config, made.params, TEACHER, teacher)
  assert np.any(made.params["layers.0.mlp.up.kernel"][:, 24:])


@pytest.mark.parametrize("renormalise", [True, False])
def test_experts_as_wide_as_the_teachers_dense_mlp_start_with_its_outputs(renormalise):
  mixture = MoeConfig(width=24, num_experts=4, top_k=4, renormalise=renormalise)
  config = dataclasses.replace(TEACHER, layers=(dataclasses.replace(LAYER, mlp=mixture),) * 3)
  teacher = random(TEACHER, 0)
  params = start(TEACHER, teacher, config).params
  assert_equal_logits(config, params, TEACHER, teacher)


def test_a_shared_expert_added_to_a_dense_teachers_mlp_starts_with_zero_output():
  mixture = MoeConfig(width=24, num_experts=4, top_k=2, shared=8)
  config = dataclasses.replace(TEACHER, layers=(dataclasses.replace(LAYER, mlp=mixture),) * 3)
  teacher = random(TEACHER, 0)
  assert_equal_logits(config, start(TEACHER, teacher, config).params, TEACHER, teacher)


def test_narrow_experts_together_hold_each_neuron_of_the_dense_mlp_equally_often():
  config = dataclasses.replace(
    TEACHER, layers=(dataclasses.replace(LAYER, mlp=MoeConfig(width=12, num_experts=4, top_k=2)),) * 3
  )
  teacher = random(TEACHER, 0)
  params = start(TEACHER, teacher, config).params
  kernel = params["layers.1.mlp.experts.down.kernel"]
  whole = 2 * teacher["layers.1.mlp.down.kernel"]
  np.testing.assert_array_equal(kernel.reshape(2, 24, 16), [whole, whole])
  np.testing.assert_array_equal(params["layers.1.mlp.experts.up.kernel"][3], teacher["layers.1.mlp.up.kernel"][:, 12:])
