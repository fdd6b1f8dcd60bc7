"""Measures the cost of routed adapters: a teacher's forward pass with four routes against one with a merged adapter.

python -m tools.bench_routing [--width=512] [--layers=4] [--rank=16] [--rows=8] [--length=256] [--rounds=10]

There are four adapters on all projections, and each of the four routes uses one of them. The two teachers are timed
alternately, so that a busy machine slows both alike. Expected ratio at width 512 and rank 16: at most 1.15.
"""

import argparse
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from distill.adapters import routed
from distill.adapters.edits import LowRank
from distill.adapters.merging import merge_adapters
from distill.adapters.peft import Adapter
from distill.adapters.stack import StackEntry
from distill.checkpoints import hf_config
from distill.models.decoder import Decoder
from distill.teachers.live import LiveTeacher
from distill.types import Batch

_ADAPTERS = 4


def main() -> None:
  """Builds both teachers, times them, and prints how much their logits differ and the ratio of their times."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  for name, default in dict(width=512, layers=4, rank=16, rows=8, length=256, vocab=8192, rounds=10).items():
    parser.add_argument(f"--{name}", type=int, default=default)
  parser.add_argument("--dtype", default="float32")
  arguments = parser.parse_args()
  config = hf_config.config_from_dict(_llama(arguments), where="benchmark")
  decoder = Decoder(config)
  base = decoder.unstack(jax.device_get(jax.jit(decoder.init)(jax.random.key(0))))
  adapters = [_adapter(base, number, rank=arguments.rank) for number in range(_ADAPTERS)]
  merged_config, merged = merge_adapters(base, adapters=adapters[:1], config=config)
  live_config, stacked = routed.stack_with_routes(base, routes=[[one] for one in adapters], config=config)
  teachers = {
    "merged": LiveTeacher(decoder=Decoder(merged_config), params=jax.device_put(Decoder(merged_config).stack(merged))),
    "routed": LiveTeacher(decoder=Decoder(live_config), params=jax.device_put(stacked)),
  }
  batch = _batch(arguments, config.vocab_size)
  forwards = {name: _forward(teacher, jnp.dtype(arguments.dtype)) for name, teacher in teachers.items()}
  answers = {name: np.asarray(forward(batch)) for name, forward in forwards.items()}
  first = np.asarray(batch.routes) == 0
  difference = np.linalg.norm((answers["routed"] - answers["merged"])[first]) / np.linalg.norm(answers["merged"][first])
  times: dict[str, list[float]] = {name: [] for name in forwards}
  for _ in range(arguments.rounds):
    for name, forward in forwards.items():
      start = time.perf_counter()
      forward(batch).block_until_ready()
      times[name].append(time.perf_counter() - start)
  ratio = statistics.median(routed / merged for merged, routed in zip(times["merged"], times["routed"], strict=True))
  print(f"rows of the merged set differ by {difference:.1e}")
  print(f"fastest: merged {min(times['merged']):.3f} s, routed {min(times['routed']):.3f} s")
  print(f"ratio {min(times['routed']) / min(times['merged']):.3f} of the fastest, {ratio:.3f} in the median of pairs")


def _llama(arguments) -> dict:
  return {
    "model_type": "llama",
    "vocab_size": arguments.vocab,
    "hidden_size": arguments.width,
    "intermediate_size": 4 * arguments.width,
    "num_hidden_layers": arguments.layers,
    "num_attention_heads": arguments.width // 64,
    "num_key_value_heads": arguments.width // 64,
  }


def _adapter(base, number: int, *, rank: int):
  rng = np.random.default_rng(number)
  edits = tuple(
    (
      name,
      LowRank(
        a=rng.normal(size=(x.shape[0], rank)).astype(np.float32) * x.shape[0] ** -0.5,
        b=rng.normal(size=(rank, x.shape[1])).astype(np.float32) * 0.1,
        scale=1.0,
      ),
    )
    for name, x in base.items()
    if name.startswith("layers.") and name.endswith(".kernel")
  )
  path = pathlib.Path(f"adapter{number}")
  return StackEntry(path=path), Adapter(path=path, edits=edits)


def _batch(arguments, vocab: int) -> Batch:
  tokens = jax.random.randint(jax.random.key(1), (arguments.rows, arguments.length), 0, vocab)
  return Batch(
    tokens=tokens,
    segments=jnp.ones_like(tokens),
    positions=jnp.broadcast_to(jnp.arange(arguments.length), tokens.shape),
    loss_mask=jnp.ones(tokens.shape, jnp.float32),
    routes=jnp.arange(arguments.rows) % _ADAPTERS,
  )


def _forward(teacher: LiveTeacher, dtype):
  @jax.jit
  def forward(params, batch):
    signal = teacher.signal(params, batch=batch, dtype=dtype)
    return signal.readout.logits(signal.hidden)

  return lambda batch: forward(teacher.params, batch)


if __name__ == "__main__":
  main()
