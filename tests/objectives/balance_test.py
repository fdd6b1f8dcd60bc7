"""The load-balancing loss of MoE layers, alone and in a training run."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from distill.jobs.train import train
from distill.objectives.balance import Balance
from tests.objectives.problem import inputs, sums

# A run within this process meets what optax says of its own functions.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SPARSE = {
  "model_type": "qwen3_moe",
  "vocab_size": 304,
  "hidden_size": 32,
  "intermediate_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 8,
  "num_experts": 6,
  "num_experts_per_tok": 2,
  "moe_intermediate_size": 16,
}


def config(llama_dir, text_file, *, student, training, terms=()):
  terms = [{"kind": "cross_entropy"}, {"kind": "balance", "weight": 0.5}, *terms]
  return {
    "tokenizer": str(llama_dir),
    "teacher": {"model": str(llama_dir)},
    "student": student,
    "data": {"sources": [{"kind": "jsonl", "path": str(text_file)}], "length": 32},
    "training": {"batch_size": 16, "dtype": "float32", **training},
    "stages": [{"name": "only", "steps": 3, "terms": terms, "optimizer": {"learning_rate": 1e-2}}],
  }


def test_the_balance_loss_is_the_same_on_another_mesh_with_micro_batches(llama_dir, text_file, tmp_path):
  found, taught = [], [{"kind": "forward_kl"}, {"kind": "hidden", "pairs": ((0, 1), (1, 3))}]
  for number, training in enumerate(({"mesh": {}}, {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "micro_batches": 2})):
    settings = config(llama_dir, text_file, student={"config": SPARSE}, training=training, terms=taught)
    train(settings, workdir=tmp_path / str(number))
    lines = (tmp_path / str(number) / "metrics.jsonl").read_text().splitlines()
    found.append([json.loads(line) for line in lines])
  for one, other in zip(*found, strict=True):
    for name in ("loss", "0_cross_entropy", "1_balance", "2_forward_kl", "3_hidden"):
      assert one[name] == pytest.approx(other[name], rel=1e-4), name
    assert 0.9 < one["1_balance"] < 3.0


def test_the_balance_loss_weights_each_row_by_its_number_of_tokens():
  given = inputs(4)
  segments = jnp.asarray(np.arange(9) < np.asarray([9, 4, 0, 2])[:, None], int)
  given = dataclasses.replace(
    given,
    batch=dataclasses.replace(given.batch, segments=segments),
    output=dataclasses.replace(given.output, balance=jnp.asarray([1.0, 1.5, 9.0, 2.0])),
  )
  total, _ = sums([Balance(weight=0.1)], given)
  np.testing.assert_allclose(total, 0.1 * (9 * 1.0 + 4 * 1.5 + 2 * 2.0) / 15, rtol=1e-6)
