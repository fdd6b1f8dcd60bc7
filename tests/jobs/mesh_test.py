"""The same run on one device and on meshes of eight: losses and parameters agree."""

import jax
import numpy as np
import pytest

from distill.checkpoints import hf_config
from distill.jobs import stage_state
from distill.jobs.config import resolve
from distill.jobs.models import Models
from distill.jobs.prepare import Run
from distill.jobs.stages import read_stages, term_params
from distill.jobs.train import make_steps
from distill.models.decoder import Decoder
from distill.parallel.mesh import MeshConfig, make_mesh, to_global_batch
from distill.teachers.live import LiveTeacher
from distill.types import Batch
from tests.jobs.pair import HYBRID, TEACHER, VOCAB

STEPS, ROWS, LENGTH = 20, 16, 32
SHUFFLED = (5, 2, 7, 0, 3, 6, 1, 4)
MESHES = {
  "data": MeshConfig(),
  "fsdp": MeshConfig(data=1, fsdp=8),
  "tensor": MeshConfig(data=2, tensor=4),
  "cube": MeshConfig(data=2, fsdp=2, tensor=2),
  "slices": MeshConfig(slice=2, data=2, fsdp=2),
  "expert": MeshConfig(data=2, fsdp=2, expert=2),
}


def batch(step):
  rng = np.random.default_rng(step)
  segments = np.sort(rng.integers(1, 4, (ROWS, LENGTH)), axis=1).astype(np.int32)
  starts = np.concatenate([np.ones((ROWS, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
  index = np.broadcast_to(np.arange(LENGTH), segments.shape)
  positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
  mask = np.concatenate([segments[:, 1:] == segments[:, :-1], np.zeros((ROWS, 1), bool)], axis=1)
  return Batch(
    tokens=rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32),
    segments=segments,
    positions=positions.astype(np.int32),
    loss_mask=mask.astype(np.float32),
    routes=np.zeros(ROWS, np.int32),
  )


def run(mesh):
  """Returns the losses of twenty steps and the student's parameters after them, as host arrays."""
  config = resolve(
    {
      "teacher": {"config": TEACHER},
      "student": {"config": HYBRID},
      "data": {"sources": [{"kind": "text", "path": "text.txt"}], "length": LENGTH},
      "training": {"batch_size": ROWS, "dtype": "float32"},
      "stages": [
        {
          "name": "distill",
          "steps": STEPS,
          "terms": [{"kind": "forward_kl"}, {"kind": "hidden", "pairs": ((1, 3),), "weight": 0.3}],
          # Gentle enough that rounding does not grow: at 3e-3, parameters changed by 1e-7 end at losses 3e-4 apart.
          "optimizer": {"learning_rate": 5e-4, "eps": 1e-5},
        }
      ],
    }
  )
  student, teacher = (Decoder(hf_config.config_from_dict(one, where="config.json")) for one in (HYBRID, TEACHER))
  params, theirs = (
    jax.jit(decoder.init, out_shardings=decoder.shardings(mesh))(jax.random.key(seed))
    for seed, decoder in enumerate((student, teacher))
  )
  live = LiveTeacher(decoder=teacher, params=theirs)
  flat = {f"student.{name}": x for name, x in params.items()}
  models = Models(student=student, params=flat, teacher=live, adapter_scale=1.0)
  stages = read_stages(config.stages, models)
  whole = Run(config=config, mesh=mesh, models=models, stages=stages, batches={}, resumes=False)
  state, optimizer = stage_state.begin(whole, stages[0], flat | term_params(stages, seed=0, mesh=mesh))
  step = make_steps(whole, stages[0], state, optimizer)["projections"]
  losses = []
  for number in range(STEPS):
    state, metrics = step(state, theirs, to_global_batch(batch(number), mesh=mesh))
    losses.append(float(metrics["loss"]))
  return losses, jax.device_get(state.params)


@pytest.fixture(scope="module")
def single():
  return run(make_mesh(devices=jax.devices()[:1]))


def meshes():
  for name in MESHES:
    yield pytest.param(name, range(8), id=name, marks=[] if name == "cube" else pytest.mark.slow)
  for name in ("cube", "fsdp"):
    yield pytest.param(name, SHUFFLED, id=f"{name} shuffled", marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "order"), list(meshes()))
def test_twenty_steps_on_a_mesh_have_the_losses_and_parameters_of_one_device(name, order, single):
  losses, params = run(make_mesh(MESHES[name], devices=[jax.devices()[i] for i in order]))
  expected_losses, expected = single
  np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
  assert losses[-1] < 0.97 * losses[0]
  for key, value in expected.items():
    # Parameters that start at zero are small; 1e-5 is a fiftieth of one step of Adam.
    np.testing.assert_allclose(params[key], value, rtol=1e-4, atol=1e-5)
