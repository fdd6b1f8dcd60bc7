"""A loss term from outside the package can be trained without a change to the package."""

import dataclasses
import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest

from distill.configuration import option
from distill.errors import InputError
from distill.jobs.train import train
from distill.objectives.term import Term
from distill.types import Capture
from tests.objectives.problem import bound

# A run within this process meets what optax says of its own functions.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norms(Term):
  """Loss term: squared difference of both models' mean output norms, with a trained scale and a step count as state."""

  kind: ClassVar[str] = "norms"
  runs_teacher: ClassVar[bool] = True

  layer: int = option(help="The layer of both models.", least=0)

  def student_capture(self):
    return Capture(layers=(self.layer,))

  def teacher_capture(self):
    return Capture(layers=(self.layer,))

  def init_params(self, setting, *, key):
    return {"norms.scale": jnp.ones(())}

  def initial_state(self):
    return {"steps": jnp.zeros(())}

  def next_state(self, state, **_):
    return {"steps": state["steps"] + 1.0}

  def loss(self, inputs, context):
    student, teacher = (jnp.linalg.norm(x.layers[self.layer], axis=-1) for x in (inputs.output, inputs.signal))
    present = inputs.batch.segments > 0
    far = jnp.square(inputs.params["norms.scale"] * student - jax.lax.stop_gradient(teacher))
    return jnp.sum(present.astype(jnp.float32) * far) / context.totals["present"]


def config(llama_dir, text_file, kind):
  student = json.loads((llama_dir / "config.json").read_text())
  keys = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
  return {
    "teacher": {"model": str(llama_dir)},
    "student": {"config": {**{key: student[key] for key in keys}, "num_hidden_layers": 1}},
    "data": {"sources": [{"kind": "jsonl", "path": str(text_file)}], "length": 16},
    "training": {"batch_size": 8, "dtype": "float32"},
    "stages": [
      {
        "name": "only",
        "steps": 10,
        "terms": [{"kind": kind, "layer": 0, "weight": 0.5}],
        "optimizer": {"learning_rate": 1e-2},
      }
    ],
  }


def test_a_stage_trains_a_term_from_outside_the_package_with_a_live_teacher(llama_dir, text_file, tmp_path):
  assert train(config(llama_dir, text_file, f"{__name__}:Norms"), workdir=tmp_path) == 0
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert len(lines) == 10
  assert lines[-1]["0_norms"] < 0.5 * lines[0]["0_norms"]
  assert lines[-1]["loss"] == pytest.approx(0.5 * lines[-1]["0_norms"])


@dataclasses.dataclass(frozen=True)
class NoTerm:
  """A dataclass that implements no part of the term protocol."""


@pytest.mark.parametrize(
  ("kind", "message"),
  [
    ("nowhere.at_all:Term", "cannot be imported .ModuleNotFoundError: No module named 'nowhere'.; correct it, or put"),
    (f"{__name__}:Missing", "cannot be imported .AttributeError"),
    (f"{__name__}:config", "cannot be used as a term: it is not a class"),
    (f"{__name__}:NoTerm", "cannot be used as a term: it has no kind"),
  ],
)
def test_a_term_kind_that_names_no_term_class_is_refused(kind, message):
  with pytest.raises(InputError, match=r"^config\.stages\.a\.terms\[0\]\.kind: .*" + message) as error:
    bound({"kind": kind})
  assert "\n" not in str(error.value)


def test_a_wrong_option_of_a_term_from_outside_the_package_is_refused():
  with pytest.raises(
    InputError, match=r"config\.stages\.a\.terms\[0\]\.layer: got -1; use a whole number of at least 0"
  ):
    bound({"kind": f"{__name__}:Norms", "layer": -1})
