"""Faults of whole runs that public distillation frameworks have had; tests/faults_test.py has those of one step."""

import json

import numpy as np
import pytest

from distill.checkpoints import hf
from distill.errors import InputError
from distill.jobs.train import train
from distill.training.checkpoint import Checkpoints
from tests.processes import two

# A run within this process meets what optax says of its own functions.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def config(llama_dir, text_file):
  """A configuration that distils a tiny teacher into a copy of itself in three steps."""
  terms = [{"kind": "reverse_kl"}, {"kind": "cross_entropy"}]
  return {
    "teacher": {"model": str(llama_dir)},
    "student": {"model": str(llama_dir)},
    "data": {"sources": [{"kind": "jsonl", "path": str(text_file)}], "length": 16},
    "training": {"batch_size": 16, "dtype": "float32"},
    "stages": [{"name": "only", "steps": 3, "terms": terms, "optimizer": {"learning_rate": 1e-3}}],
  }


def losses(workdir):
  return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


# Each process its half of every batch, teacher and student over both.
STEPS = """
import ast, pathlib
import numpy as np
from distill.parallel.mesh import to_global_batch
from distill.jobs import stage_state, train
from distill.jobs.run_directory import RunDirectory
from distill.jobs.config import resolve

# FAULT

directory = RunDirectory(pathlib.Path(sys.argv[4]) / str(RANK))
run, params = train.prepare(resolve(ast.literal_eval(sys.argv[3])), directory=directory)
(stage,) = run.stages
state, optimizer = stage_state.begin(run, stage, params)
step, teacher = train.compile_step(run, stage, state, optimizer), train.teacher_params(run, stage)
losses = []
for number in range(3):
  batch = run.batches[stage.name].batch(number, params)
  state, metrics = step(state, teacher, to_global_batch(batch, mesh=run.mesh))
  losses.append(float(metrics["loss"]))
print(losses)
"""

# What the teacher says is handed to the step by the host.
BY_THE_HOST = """
from distill.teachers.live import LiveTeacher

def by_the_host(right, **fixed):
  def step(state, params, batch):
    hidden = jax.jit(lambda params, batch: fixed["teacher"].signal(params, batch=batch).hidden)(params, batch)
    np.asarray(hidden)
    return right(state, params, batch)
  step.lower = right.lower
  return step

make_step = train.make_step
train.make_step = lambda student, **fixed: by_the_host(make_step(student, **fixed), **fixed)
"""


def test_a_teacher_sharded_over_two_processes_gives_the_losses_of_one_process(config, tmp_path):
  assert train(config, workdir=tmp_path / "one") == 0
  for code, out, errors in two(STEPS, repr(config), tmp_path):
    assert code == 0, errors
    np.testing.assert_allclose(json.loads(out.splitlines()[-1]), losses(tmp_path / "one"), rtol=1e-5)
  for code, _, errors in two(STEPS.replace("# FAULT", BY_THE_HOST), repr(config), tmp_path / "fault"):
    assert code != 0 and "non-addressable" in errors


def an_export_that_fails_costs_no_step(config, workdir):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(hf, "save", _no_space)
    with pytest.raises(InputError, match="No space"):
      train(config, workdir=workdir)
  seen = []
  with pytest.MonkeyPatch.context() as patch:
    right = Checkpoints.save
    patch.setattr(Checkpoints, "save", lambda self, step, **kept: (seen.append(step), right(self, step, **kept)))
    assert train(config, workdir=workdir) == 0
  assert not seen and len(losses(workdir)) == 3 and (workdir / "student/model.safetensors").exists()


def _no_space(directory, **kept):
  raise InputError(f"{directory}: cannot be written (No space left on device)")


def test_a_run_whose_export_failed_is_resumed_without_repeating_a_step(config, tmp_path, monkeypatch):
  an_export_that_fails_costs_no_step(config, tmp_path / "right")
  monkeypatch.setattr(Checkpoints, "save", lambda self, step, **kept: None)  # It would come after the export.
  with pytest.raises(AssertionError):
    an_export_that_fails_costs_no_step(config, tmp_path / "fault")
