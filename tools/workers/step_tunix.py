"""Times training steps of Tunix's `DistillationTrainer` and Llama on checkpoints, for tools/bench_step.py.

Runs in the environment .peers/tunix, which tools/bench_peers.sh creates.
"""

import itertools
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tunix.distillation import distillation_trainer, strategies
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as llama_params

from tools.workers.serve import forget_peak, peak, resident, serve


def main() -> None:
  """Runs the worker: times a round of steps for each line on stdin."""
  serve(_prepare)


def _prepare(settings: Mapping[str, Any]) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
  jax.block_until_ready(jnp.zeros(8))
  before = resident()
  mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  student, teacher = (
    _model(pathlib.Path(settings["directory"]) / name, mesh, settings["dtype"]) for name in ("student", "teacher")
  )
  losses: list[Any] = []

  def labels(input_tokens, **_):
    return jax.nn.one_hot(jnp.roll(input_tokens, -1, axis=1), settings["vocab"], dtype=jnp.float32)

  def forward(model, input_tokens, positions, cache, attention_mask):
    return model(input_tokens, positions, cache, attention_mask)[0]

  strategy = strategies.LogitStrategy(forward, forward, labels, temperature=1.0, alpha=0.5)
  trainer = distillation_trainer.DistillationTrainer(
    student,
    teacher,
    strategy,
    optax.adamw(settings["learning_rate"], b2=0.95, weight_decay=0.0),
    distillation_trainer.TrainingConfig(eval_every_n_steps=10**9),
  ).with_gen_model_input_fn(_inputs)
  trainer.is_managed_externally = True
  trainer._write_train_metrics = lambda: losses.append(trainer._buffered_train_metrics.loss) or _clear(trainer)
  batches = _batches(settings)
  with mesh:
    # It compiles in the first call, and once more in the second.
    for _ in range(2):
      trainer.train(itertools.islice(batches, 1))
    first = float(losses[0])

    def run() -> dict[str, Any]:
      forget_peak()
      start = time.perf_counter()
      trainer.train(itertools.islice(batches, settings["steps"]))
      jax.block_until_ready(jax.tree.leaves(trainer.model))
      return {"seconds": time.perf_counter() - start, "bytes": peak() - before}

    return {"loss": first}, run


def _clear(trainer) -> None:
  trainer._buffered_train_metrics = None


def _inputs(example) -> dict[str, Any]:
  length = example.input_tokens.shape[1]
  causal = jnp.tril(jnp.ones((length, length), bool))
  return {
    "input_tokens": example.input_tokens,
    "positions": jnp.broadcast_to(jnp.arange(length), example.input_tokens.shape),
    "cache": None,
    "attention_mask": jnp.broadcast_to(causal, (len(example.input_tokens), length, length)),
  }


def _batches(settings: Mapping[str, Any]) -> Iterator[distillation_trainer.TrainingInput]:
  random = np.random.default_rng(0)
  shape = settings["batch"], settings["length"]
  while True:
    tokens = random.integers(0, settings["vocab"], shape).astype(np.int32)
    yield distillation_trainer.TrainingInput(input_tokens=tokens, input_mask=np.ones(shape, bool))


def _model(directory: pathlib.Path, mesh, dtype: str) -> llama.Llama3:
  found = json.loads((directory / "config.json").read_text())
  config = llama.ModelConfig(
    num_layers=found["num_hidden_layers"],
    vocab_size=found["vocab_size"],
    embed_dim=found["hidden_size"],
    hidden_dim=found["intermediate_size"],
    num_heads=found["num_attention_heads"],
    head_dim=found["head_dim"],
    num_kv_heads=found["num_key_value_heads"],
    rope_theta=1_000_000,
    norm_eps=found["rms_norm_eps"],
    weight_tying=found["tie_word_embeddings"],
  )
  return llama_params.create_model_from_safe_tensors(str(directory), config, mesh, dtype=jnp.dtype(dtype))


if __name__ == "__main__":
  main()
