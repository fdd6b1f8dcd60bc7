"""A recipe resolves to one typed configuration, or is refused in one line that names the key."""

import dataclasses
import json
import re

import pytest
from ml_collections import ConfigDict

from distill.errors import InputError
from distill.jobs.config import difference, fingerprint, resolve

STAGE = {"name": "only", "steps": 4, "terms": [{"kind": "cross_entropy"}]}
RECIPE = {"data": {"sources": [{"kind": "text", "path": "a.txt"}]}, "stages": [STAGE]}


def stages(*names):
  return {**RECIPE, "stages": [{**STAGE, "name": name} for name in names]}


def test_stages_keep_the_order_of_the_recipes_list():
  names = [f"{number}_stage" for number in (1, 2, 9, 10, 3)]
  assert [stage.name for stage in resolve(ConfigDict(stages(*names))).stages] == names


def test_resolve_fills_in_defaults_and_returns_a_resolved_configuration_unchanged():
  config = resolve(RECIPE)
  assert config.training.micro_batches == 1 and config.stages[0].optimizer.b2 == 0.95
  assert config.data.sources[0].weight == 1.0 and config.stage_shape(config.stages[0]) == (8, 256)
  assert resolve(config) is config


def test_a_stage_may_override_batch_size_and_length():
  config = resolve({**RECIPE, "stages": [{**STAGE, "batch_size": 4, "length": 512}]})
  assert config.stage_shape(config.stages[0]) == (4, 512)


def test_the_error_for_stages_as_a_dict_shows_the_list_to_write_instead():
  message = (
    "config.stages: got a dict, but the order of the elements matters; give a list: "
    "[{'name': 'align', …}, {'name': 'distill', …}]"
  )
  with pytest.raises(InputError, match=re.escape(message)):
    resolve({**RECIPE, "stages": {"align": {"steps": 1}, "distill": {"steps": 1}}})


def stage(**changes):
  return {"stages": [{**STAGE, **changes}]}


def optimizer(**options):
  return stage(optimizer=options)


@pytest.mark.parametrize(
  ("change", "key"),
  [
    (stages("a", "a"), "config.stages[1].name: 'a' is already the name of another element; choose a different name"),
    (stages("1"), "config.stages: '1' is not a valid stage name"),
    (stages("a.b"), "config.stages: 'a.b' is not a valid stage name"),
    (stages(), "config.stages: empty; give at least one stage"),
    (stage(steps=0), "config.stages.only.steps: got 0"),
    (stage(steps=2.0), "config.stages.only.steps: got 2.0"),
    (stage(length=1), "config.stages.only.length: 1"),
    (stage(terms=None), "config.stages.only.terms: got None"),
    (stage(train=".*"), "config.stages.only.train: got '.*'"),
    (stage(train=None), "config.stages.only.train: got None"),
    (stage(train=((".*[", 1.0),)), "config.stages.only.train[0][0]: '.*[' is not a valid regular expression"),
    (stage(optimizer=None), "config.stages.only.optimizer: got None"),
    (optimizer(learning_rate="0.001"), "config.stages.only.optimizer.learning_rate: got '0.001'"),
    (optimizer(learning_rate=None), "config.stages.only.optimizer.learning_rate: got None"),
    (optimizer(learning_rate=-1e-3), "config.stages.only.optimizer.learning_rate: got -0.001"),
    (optimizer(learning_rate=float("nan")), "config.stages.only.optimizer.learning_rate: got nan"),
    (
      optimizer(learning_rate={"kind": "linear", "start": 1, "end": -1}),
      "config.stages.only.optimizer.learning_rate: got kind linear, start 1.0, end -1.0; use numbers of at least 0",
    ),
    (
      optimizer(learning_rate={"kind": "cosine", "peak": 1e-3, "warmup": 4}),
      "config.stages.only.optimizer.learning_rate.warmup: got 4 steps, but the stage has only 4; use fewer",
    ),
    (optimizer(weight_decay="0.1"), "config.stages.only.optimizer.weight_decay: got '0.1'"),
    (optimizer(b1="0.9"), "config.stages.only.optimizer.b1: got '0.9'"),
    (optimizer(clip_norm=-1), "config.stages.only.optimizer.clip_norm: got -1"),
    (optimizer(decays=((".*[", 1.0),)), "config.stages.only.optimizer.decays[0][0]: '.*['"),
    (optimizer(decays=((".*", -1.0),)), "config.stages.only.optimizer.decays[0][1]: got -1.0"),
    (optimizer(learning_rat=1), "did you mean config.stages.only.optimizer.learning_rate?"),
    ({"seed": -1}, "config.seed: got -1"),
    ({"seed": None}, "config.seed: got None"),
    ({"seed": "0"}, "config.seed: got '0'"),
    ({"stage": []}, "did you mean config.stages?"),
    ({"teacher": {"dtype": "int8"}}, "config.teacher.dtype: got 'int8'"),
    ({"student": {"layers_from": "last"}}, "config.student.layers_from: 'last'"),
    ({"student": {"layers_from": (0, 1.5)}}, "config.student.layers_from[1]: got 1.5"),
    ({"student": {"calibration_rows": 0}}, "config.student.calibration_rows: got 0"),
    ({"student": {"config": "student.json"}}, "config.student.config: got 'student.json'"),
    ({"student": {"model": 3}}, "config.student.model: got 3"),
    ({"student": {"adapters": {"rank": 0}}}, "config.student.adapters.rank: got 0"),
    ({"student": {"adapters": {"targets": "("}}}, "config.student.adapters.targets: '('"),
    ({"data": {"sources": "a.txt"}}, "config.data.sources: got 'a.txt'; give a list"),
    ({"data": {"sources": ["a.txt"]}}, "config.data.sources[0]: got 'a.txt'; give a dict with a kind"),
    (
      {"data": {"sources": [{**RECIPE["data"]["sources"][0], "weight": "two"}]}},
      "config.data.sources[0].weight: got 'two'",
    ),
    (
      {"data": {"sources": [{**RECIPE["data"]["sources"][0], "adapters": 3}]}},
      "config.data.sources[0].adapters: got 3",
    ),
    ({"data": {"sources": [], "store": 3}}, "config.data.store: got 3"),
    ({"training": {"batch_size": True}}, "config.training.batch_size: got True"),
    ({"training": {"micro_batches": 3}}, "config.training.micro_batches: 3 does not divide the 8 rows of a batch"),
    ({"training": {"dtype": "float16"}}, "config.training.dtype: got 'float16'"),
    ({"training": {"checkpoint_every": 0}}, "config.training.checkpoint_every: got 0"),
    ({"training": {"checkpoint_every": "2"}}, "config.training.checkpoint_every: got '2'"),
    ({"training": {"mesh": "auto"}}, "config.training.mesh: got 'auto'"),
    ({"training": {"mesh": None}}, "config.training.mesh: got None"),
    ({"training": {"mesh": {"fsdp": 0}}}, "config.training.mesh.fsdp: got 0"),
    ({"evaluation": {"skills": None}}, "config.evaluation.skills: got None"),
  ],
)
def test_the_error_for_a_wrong_value_names_its_key(change, key):
  with pytest.raises(InputError, match=re.escape(key)) as error:
    resolve({**RECIPE, **change})
  assert "\n" not in str(error.value)


def test_the_fingerprint_ignores_keys_that_do_not_affect_the_result():
  same = {"training": {"checkpoint_every": 3, "log_every": 2, "mesh": {"data": 1}}, "evaluation": {"skills": ["a"]}}
  assert fingerprint(resolve({**RECIPE, **same})) == fingerprint(resolve(RECIPE))
  assert fingerprint(resolve({**RECIPE, "seed": 1})) != fingerprint(resolve(RECIPE))
  here, there = (resolve({**RECIPE, "teacher": {"cache": name}}) for name in ("here", "there"))
  assert fingerprint(here) == fingerprint(there) != fingerprint(resolve(RECIPE))


def test_difference_returns_the_first_differing_key_that_affects_the_result():
  earlier = json.loads(json.dumps(dataclasses.asdict(resolve(RECIPE))))
  assert difference(earlier, resolve(RECIPE)) == ""
  assert difference(earlier, resolve({**RECIPE, **stage(steps=5)})) == "config.stages[0].steps"
  assert difference(earlier, resolve({**RECIPE, "evaluation": {"skills": ["a"]}})) == ""
