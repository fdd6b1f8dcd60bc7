import dataclasses

import numpy as np
import pytest

from distill.errors import InputError
from distill.models.config import LayerConfig
from tests.initialise.students import LAYER, MLP, TEACHER, assert_equal_logits, random, start

MULTIPLIED = dataclasses.replace(
  TEACHER,
  layers=(dataclasses.replace(LAYER, mixer=dataclasses.replace(LAYER.mixer, scale=0.7, use_bias=True)),) * 3,
  embed_scale=5.0,
  residual_scale=0.3,
  logit_scale=0.25,
)


@pytest.mark.parametrize("gated", [False, True])
def test_a_student_without_multipliers_starts_with_the_logits_of_a_teacher_that_has_them(gated):
  mixer = dataclasses.replace(LAYER.mixer, use_bias=True, gated=gated)
  config = dataclasses.replace(TEACHER, layers=(LayerConfig(mixer=mixer, mlp=MLP),) * 3, tie_embeddings=False)
  teacher = random(MULTIPLIED, 0)
  params = start(MULTIPLIED, teacher, config).params
  if gated:
    for i in range(3):
      # A gate starts at zero and passes half.
      np.testing.assert_array_equal(params[f"layers.{i}.mixer.q.bias"].reshape(4, 2, 8)[:, 1], 0.0)
  assert_equal_logits(config, params, MULTIPLIED, teacher)


def test_a_student_with_tied_embeddings_takes_the_logit_multiplier_into_its_final_norm():
  teacher = random(MULTIPLIED, 0)
  config = dataclasses.replace(MULTIPLIED, embed_scale=1.0, residual_scale=1.0, logit_scale=1.0)
  params = start(MULTIPLIED, teacher, config).params
  assert_equal_logits(config, params, MULTIPLIED, teacher)


def test_a_teachers_embedding_multiplier_is_refused_for_a_tied_student_with_another_kind_of_norm():
  config = dataclasses.replace(TEACHER, norm="layer")
  with pytest.raises(InputError, match="tie_word_embeddings"):
    start(MULTIPLIED, random(MULTIPLIED, 0), config)


def test_norms_of_another_kind_than_the_teachers_keep_their_initial_values():
  config = dataclasses.replace(TEACHER, norm="layer")
  taken = start(TEACHER, random(TEACHER, 0), config).taken
  assert not any(name.endswith("_norm.scale") or name == "norm.scale" for name in taken)
  assert "layers.0.mlp.up.kernel" in taken
