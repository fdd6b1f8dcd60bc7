"""A run that was stopped between two stages and resumed has the losses of an uninterrupted run."""

import json

import numpy as np
import pytest

from distill.jobs.train import train
from distill.types import Batch

STUDENT = {
  "model_type": "llama",
  "vocab_size": 304,
  "hidden_size": 16,
  "intermediate_size": 16,
  "num_hidden_layers": 1,
  "num_attention_heads": 1,
  "num_key_value_heads": 1,
}


class Rows:
  """Batch source of random tokens seeded by the step; at step `fails_at` it raises an error."""

  def __init__(self, *, fails_at=None):
    self._fails_at = fails_at

  def batch(self, step, params):
    if step == self._fails_at:
      raise OSError("the disk is gone")
    tokens = np.random.default_rng(step).integers(0, 300, (8, 8)).astype(np.int32)
    positions = np.broadcast_to(np.arange(8, dtype=np.int32), (8, 8))
    return Batch(
      tokens=tokens,
      segments=np.ones_like(tokens),
      positions=positions,
      loss_mask=(positions < 7).astype(np.float32),
    )


@pytest.fixture
def run(tokenizer_dir, tmp_path):
  """Returns a function that trains two stages of three steps under `workdir`, and returns the logged losses."""
  stages = [
    {"name": name, "steps": 3, "terms": [{"kind": "cross_entropy"}], "optimizer": {"learning_rate": 1e-2}}
    for name in ("first", "second")
  ]
  recipe = {
    "tokenizer": str(tokenizer_dir),
    "student": {"config": STUDENT},
    "data": {"sources": []},
    "training": {"dtype": "float32"},
    "stages": stages,
  }

  def run(workdir, **second):
    train(recipe, workdir=tmp_path / workdir, batches={"first": Rows(), "second": Rows(**second)})
    lines = (tmp_path / workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]

  return run


def test_a_run_stopped_at_the_end_of_a_stage_resumes_the_next_with_a_fresh_optimizer(run):
  straight = run("straight")
  with pytest.raises(OSError, match="the disk is gone"):
    run("stopped", fails_at=0)
  assert run("stopped") == straight
