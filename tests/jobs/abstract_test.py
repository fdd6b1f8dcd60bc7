"""Models of a run as shapes: they have the names, shapes and dtypes that real ones would have."""

import pytest

from distill.checkpoints import hf_config
from distill.errors import InputError
from distill.jobs.abstract import abstract_models
from distill.jobs.config import resolve
from distill.models.decoder import Decoder
from distill.parallel.mesh import MeshConfig, make_mesh
from tests.jobs.pair import DENSE, TEACHER

MESH = make_mesh(MeshConfig(data=2, fsdp=4))


def models(**changes):
  recipe = {
    "teacher": {"config": TEACHER, "dtype": "bfloat16"},
    "student": {"config": DENSE},
    "data": {"sources": []},
    "stages": [{"name": "only", "steps": 1, "terms": [{"kind": "forward_kl"}]}],
  }
  return abstract_models(resolve({**recipe, **changes}), mesh=MESH)


def test_abstract_models_have_the_shapes_and_shardings_of_real_ones():
  found = models()
  teacher = Decoder(hf_config.config_from_dict(TEACHER, where="config.json"))
  assert {name: x.shape for name, x in found.teacher.params.items()} == {
    name: x.shape for name, x in teacher.abstract().items()
  }
  assert {name: x.sharding for name, x in found.teacher.params.items()} == teacher.shardings(MESH)
  assert {str(x.dtype) for x in found.teacher.params.values()} == {"bfloat16"}
  assert {name.partition(".")[0] for name in found.params} == {"student"}


def test_an_adapter_that_trains_is_among_the_parameters():
  found = models(student={"config": DENSE, "adapters": {"targets": r".*\.q\.kernel", "rank": 3}})
  assert any(name.startswith("adapters.") and 3 in x.shape for name, x in found.params.items())


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"teacher": {"model": "teacher", "cache": "cache"}}, "config.teacher.cache: a plan is of a live teacher"),
    ({"student": {}}, "config.student: give model .* or config"),
  ],
)
def test_a_run_that_cannot_be_built_from_shapes_is_refused_by_the_key(changes, says):
  with pytest.raises(InputError, match=says):
    models(**changes)
