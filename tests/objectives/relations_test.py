import dataclasses

import jax
import numpy as np
import pytest

from distill.errors import InputError
from distill.models.config import DecoderConfig, LayerConfig
from distill.models.decoder import Decoder
from distill.nn.mamba2 import Mamba2Config
from distill.objectives.terms import read_terms
from distill.teachers.live import LiveTeacher
from tests.objectives.problem import bound, config, setting
from tests.objectives.steps import DELTA, MLP, SOFT, decoder, trained


@pytest.mark.parametrize("mixer", ["attention", "mamba2"])
def test_the_relations_loss_trains_a_student_with_other_widths_and_mixers_than_its_teacher(mixer):
  state_space = LayerConfig(mixer=Mamba2Config(num_heads=2, head_dim=8, state_size=8), mlp=MLP)
  layer = {"attention": SOFT, "mamba2": state_space}[mixer]
  student = decoder(layer, layer)
  model = Decoder(DecoderConfig(family="llama", vocab_size=31, width=24, layers=(SOFT, SOFT, SOFT)))
  teacher = LiveTeacher(decoder=model, params=model.init(jax.random.key(1)))
  terms = bound({"kind": "relations", "pairs": ((1, 2),), "heads": 4}, steps=40, student=2, teacher=3)
  params = {f"student.{name}": x for name, x in student.init(jax.random.key(0)).items()}
  after, losses = trained(student, params, terms=terms, teacher=teacher, steps=40)
  assert losses[-1] < 0.5 * losses[0]
  # What comes after the compared layer's projections has no part in it.
  untouched = [name for name in params if ".mlp." in name or name.endswith("o.kernel")]
  assert untouched and all(np.array_equal(params[name][1], after[name][1]) for name in untouched)


def test_relation_heads_that_do_not_divide_the_projection_widths_are_refused():
  spec = {"kind": "relations", "pairs": ((0, 1),), "heads": 16}
  with pytest.raises(
    InputError,
    match=r"terms\[0\]\.heads: 16 relation heads do not divide the teacher's .* are 16, 8, 8; give a number that",
  ):
    (term,) = read_terms([spec], key="terms")
    term.bind(dataclasses.replace(setting(1, 2), student=config(1, layer=DELTA)), key="terms[0]")
