"""A batch source that is defined outside the package trains a student through `distill.jobs.train`."""

import json

import numpy as np

from distill.jobs.train import train
from distill.types import Batch


class Counting:
  """Batch source whose rows count upwards, each from a random token; it records the steps asked for."""

  def __init__(self, *, rows, length, vocab):
    self._shape, self._vocab, self.asked = (rows, length), vocab, []

  def batch(self, step, params):
    self.asked.append((step, float(np.sum(params["student.norm.scale"]))))
    first = np.random.default_rng(step).integers(0, self._vocab, (self._shape[0], 1))
    positions = np.broadcast_to(np.arange(self._shape[1], dtype=np.int32), self._shape)
    return Batch(
      tokens=((first + positions) % self._vocab).astype(np.int32),
      segments=np.ones(self._shape, np.int32),
      positions=positions,
      loss_mask=(positions < self._shape[1] - 1).astype(np.float32),
    )


def test_a_batch_source_defined_outside_the_package_trains_a_student(tokenizer_dir, tmp_path):
  source = Counting(rows=8, length=8, vocab=300)
  config = {
    "model_type": "llama",
    "vocab_size": 304,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
  }
  recipe = {
    "tokenizer": str(tokenizer_dir),
    "student": {"config": config},
    "data": {"sources": []},
    "training": {"dtype": "float32", "log_every": 5},
    "stages": [
      {"name": "only", "steps": 10, "terms": [{"kind": "cross_entropy"}], "optimizer": {"learning_rate": 1e-2}}
    ],
  }
  assert train(recipe, workdir=tmp_path, batches={"only": source}) == 0
  assert [step for step, _ in source.asked] == list(range(10))
  # The source sees the student change.
  assert len({total for _, total in source.asked}) > 5
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [(line["step"], line["tokens"]) for line in lines] == [(5, 5 * 64), (10, 5 * 64)]
  assert lines[1]["loss"] < lines[0]["loss"]
  assert (tmp_path / "student/model.safetensors").exists()
