"""Plans of a small pair for described TPU devices, where the TPU compiler is installed."""

import importlib.util
import math

import pytest

from distill.errors import InputError
from distill.jobs.plan import plan
from tests.jobs.pair import DENSE, HYBRID, TEACHER

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def recipe(student=DENSE, *, rows=8, mesh=None, **teacher):
  return {
    "teacher": {"config": TEACHER, "dtype": "bfloat16", **teacher},
    "student": {"config": student},
    "data": {"sources": [{"kind": "text", "path": "absent.txt"}], "length": 128},
    "training": {"batch_size": rows, "mesh": mesh or {"fsdp": 4}},
    "stages": [
      {"name": "align", "steps": 10, "terms": [{"kind": "hidden", "pairs": ((1, 3),)}]},
      {"name": "distill", "steps": 3600, "terms": [{"kind": "forward_kl"}]},
    ],
  }


@needs_compiler
@pytest.mark.parametrize("student", [DENSE, HYBRID], ids=["dense", "hybrid"])
def test_a_plan_compiles_the_step_without_weights_or_text_and_counts_its_work(student):
  (one,) = plan(recipe(student), topologies=["v5e:2x4"], stage="distill")
  assert (one.stage, one.devices, one.mesh, one.fits) == ("distill", 8, {"data": 2, "fsdp": 4}, True)
  assert one.tokens == 8 * 128
  assert 0 < one.memory["teacher"] < one.memory["peak"] < one.chip.memory
  # Lower than the models' own FLOPs would mean that work is not counted; much more, that it is done several times.
  assert 1 <= one.estimate.flops / one.model_flops < 2.5
  assert one.estimate.hidden <= one.estimate.serial
  assert not one.estimate.unknown_loops
  assert one.hours(2.0) == pytest.approx(2.0)
  assert one.mfu(one.estimate.serial) < one.mfu(one.estimate.hidden) < 1


@needs_compiler
def test_every_stage_is_planned_unless_one_is_named():
  plans = plan(recipe(), topologies=["v5e:2x2"])
  assert [one.stage for one in plans] == ["align", "distill"]


@needs_compiler
def test_a_step_that_exceeds_the_memory_is_planned_as_not_fitting():
  large = {**TEACHER, "hidden_size": 8192, "intermediate_size": 32768, "num_hidden_layers": 64, "head_dim": 128}
  (one,) = plan(recipe(config=large, mesh={"fsdp": 1}), topologies=["v5e:2x2"], stage="distill")
  assert not one.fits and one.estimate is None
  assert one.memory["peak"] > one.chip.memory or math.isinf(one.memory["peak"])


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    ({"stage": "later"}, "--stage=later: the recipe has no such stage"),
    ({"topologies": ["v5p"]}, "--topology=v5p"),
  ],
)
def test_the_error_for_a_plan_of_no_stage_or_topology_names_the_flag(arguments, says):
  with pytest.raises(InputError, match=says):
    plan(recipe(), **{"topologies": [], **arguments})
