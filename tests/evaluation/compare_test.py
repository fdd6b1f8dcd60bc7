"""A comparison measures models of any role, and computes their retention from the base and the teacher."""

import json

import jax
import numpy as np
import pytest

from distill.data.tokenizer import load_tokenizer
from distill.errors import InputError
from distill.evaluation import compare as measurement
from distill.evaluation.compare import compare_models, write
from distill.evaluation.model import EvaluatedModel
from distill.evaluation.skills import Example, Skill
from distill.models.config import AttentionConfig, DecoderConfig, LayerConfig
from distill.models.decoder import Decoder
from tests.evaluation.rows import THREE, report

LAYER = LayerConfig(mixer=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, rope=None), mlp=None)
DECODER = Decoder(DecoderConfig(family="llama", vocab_size=8, width=16, layers=(LAYER,)))
SKILL = Skill("s", (Example("p", ("a", "b", "c", "d"), 0),) * 100)
RIGHT = {"base": 25, "teacher": 75, "student": 65, "control": 25}


@pytest.fixture
def measured(monkeypatch, tokenizer_dir):
  """Returns a function that compares models of the given roles; `RIGHT` gives the right answers of each, of 100."""
  monkeypatch.setattr(measurement, "correct_answers", lambda model, **_: np.arange(100) < RIGHT[model.role])
  params = jax.eval_shape(DECODER.init, jax.random.key(0))

  def run(*roles):
    models = [EvaluatedModel(role=role, name=role, decoder=DECODER, params=params) for role in roles]
    return compare_models(
      models, tokenizer=load_tokenizer(tokenizer_dir), skills=[SKILL], curves=[{"step": 1, "loss": 2.0, "tokens": 3}]
    )

  return run


def test_retention_of_every_model_is_measured_against_the_base_and_the_teacher(measured):
  found = measured("control", "base", "teacher", "student")
  assert [row.accuracy.value for row in found.skills] == [0.25, 0.25, 0.75, 0.65]
  control, base, teacher, student = (row.retention for row in found.skills)
  assert base is None and teacher is None
  np.testing.assert_allclose([control.value, student.value], [0.0, 0.8])
  assert found.models[0].layers == ("attention",) and found.curves == ({"step": 1, "loss": 2.0},)


def test_retention_is_none_if_no_teacher_is_compared(measured):
  assert [row.retention for row in measured("base", "student").skills] == [None, None]


def test_a_report_is_written_as_json_and_as_html(tmp_path):
  write(report(*THREE), out=tmp_path / "out")
  assert json.loads((tmp_path / "out/report.json").read_text())["schema"] == 2
  assert (tmp_path / "out/report.html").read_text().startswith("<!doctype html>")


def test_an_output_directory_that_the_report_cannot_be_written_to_is_refused(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="file: the report cannot be written"):
    write(report(*THREE), out=tmp_path / "file")
