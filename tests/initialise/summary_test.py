import dataclasses

from distill.initialise.summary import table
from distill.models.config import GatedDeltaConfig, LayerConfig, MoeConfig
from tests.initialise.students import LAYER, MLP, TEACHER, random, start, with_mixer


def test_a_summary_names_the_teacher_layers_of_each_part_and_the_parameters_that_stay_fresh():
  delta = GatedDeltaConfig(num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=8)
  experts = MoeConfig(width=12, num_experts=4, top_k=2)
  layers = (LayerConfig(mixer=delta, mlp=MLP), dataclasses.replace(with_mixer(head_dim=4), mlp=experts), LAYER)
  config = dataclasses.replace(TEACHER, layers=layers)
  found = table(start(TEACHER, random(TEACHER, 0), config), config=config, teacher=TEACHER).splitlines()
  lines = [" ".join(line.split()) for line in found]
  assert "gated delta 0 0 q, k, v, o of attention" in lines
  assert "attention 1 1 fresh: heads of 4, the teacher has 4 of 8" in lines
  assert "attention 2 2 copied" in lines and "MLP 0 2 0 2 copied" in lines
  assert "experts 1 1 experts of 12 of 24 neurons" in lines
  assert lines[-1].startswith("fresh: ") and "mixer.a_log" in lines[-1] and "mlp.router.kernel" in lines[-1]
