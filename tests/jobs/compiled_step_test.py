"""The compiled step of a small pair on eight virtual devices: which collectives it has, and how large they are.

Sums are right wherever they are computed, so a batch that every device holds whole shows only here.
"""

import math

import jax
import pytest

from distill.jobs import stage_state
from distill.jobs.abstract import abstract_batch, abstract_models
from distill.jobs.config import resolve
from distill.jobs.prepare import Run
from distill.jobs.stages import read_stages
from distill.jobs.train import make_steps
from distill.parallel.mesh import make_mesh
from distill.planning.chips import CHIPS
from distill.planning.estimate import traffic
from distill.planning.hlo import Program
from tests.jobs.pair import DENSE, HYBRID, LENGTH, ROWS, TEACHER, TEACHER_WIDTH, VOCAB, WIDTH


def compiled(student, mesh):
  """Returns the compiled step, and the mesh that it was compiled for."""
  config = resolve(
    {
      "teacher": {"config": TEACHER},
      "student": {"config": student},
      "data": {"sources": [{"kind": "text", "path": "text.txt"}], "length": LENGTH},
      "training": {"batch_size": ROWS, "mesh": mesh},
      "stages": [
        {"name": "distill", "steps": 10, "terms": [{"kind": "forward_kl"}, {"kind": "hidden", "pairs": ((1, 3),)}]}
      ],
    }
  )
  devices = make_mesh(config.training.mesh)
  models = abstract_models(config, mesh=devices)
  (stage,) = read_stages(config.stages, models)
  run = Run(config=config, mesh=devices, models=models, stages=(stage,), batches={}, resumes=False)
  params = models.params | jax.eval_shape(lambda: stage.term_params(0))
  state, optimizer = stage_state.abstract_state(run, stage, params)
  step = make_steps(run, stage, state, optimizer)["projections"]
  return step.lower(state, models.teacher.params, abstract_batch(run, stage)).compile(), devices


@pytest.mark.parametrize("student", [DENSE, HYBRID], ids=["dense", "hybrid"])
@pytest.mark.parametrize("mesh", [{"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_no_device_holds_activations_of_rows_that_are_not_its_own(student, mesh):
  program, devices = compiled(student, mesh)
  shards = math.prod(size for axis, size in devices.shape.items() if axis != "tensor")
  tokens = ROWS * LENGTH // shards
  for run in Program(program.as_text()).runs:
    for shape in run.instruction.results:
      rows = [dim for dim in shape.dims if dim in (ROWS, ROWS * LENGTH)]
      assert not (shape.dtype in ("f32", "bf16") and rows and math.prod(shape.dims) > tokens * TEACHER_WIDTH * 2), (
        run.instruction.name,
        shape,
      )


def test_a_step_gathers_every_kernel_where_it_is_used_and_reduces_every_gradient_once():
  program, devices = compiled(DENSE, {"data": 1, "fsdp": 8})
  moved = {"all-gather": 0.0, "all-reduce": 0.0, "reduce-scatter": 0.0, "all-to-all": 0.0}
  for one in traffic(Program(program.as_text()), chip=CHIPS["v5p"], mesh=devices):
    moved[one.kind] += one.bytes
  # float32 bytes that one device receives of an array of which it holds an eighth.
  received = 4 * 7 / 8
  student = 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * 64)
  teacher = 4 * (4 * TEACHER_WIDTH * TEACHER_WIDTH + 3 * TEACHER_WIDTH * 128)
  heads = VOCAB * (WIDTH + TEACHER_WIDTH)
  projector = WIDTH * TEACHER_WIDTH
  # The student's kernels are gathered forward and backward, the teacher's forward; each head once.
  assert moved["all-gather"] <= 1.01 * received * (teacher + 2 * student + heads)
  assert moved["reduce-scatter"] == received * VOCAB * WIDTH
  # An all-reduce is a reduce-scatter and an all-gather. Norms and metrics are small beside the kernels.
  assert moved["all-reduce"] <= 1.05 * 2 * received * (student + projector)
  # Embedded rows travel from the devices that hold a part of the model width to their own, the student's gradient back.
  assert moved["all-to-all"] == received * ROWS * LENGTH / 8 * (2 * WIDTH + TEACHER_WIDTH)
