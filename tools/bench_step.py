"""A training step against Tunix's: tokens a second and memory, in turns, each in a process of its own.

    tools/bench_peers.sh tunix
    python -m tools.bench_step [--pairs=5.5M,14M] [--rounds=5] [--steps=4] [--dtypes=float32,bfloat16] [--out=PATH]

Teacher and student are two random Llamas of one size, written once and loaded by both; rows [8,256] of random tokens;
forward KL and cross-entropy, half and half; AdamW. Tunix runs its own `DistillationTrainer` and its own Llama, in
float32, parameters and operands; ours has float32 parameters and operands of the dtype named. The losses of the first
step must agree. Memory is the most that the process holds during steps, less what it held before the models were
loaded. Tables to stdout, and with --out the figures as JSON. Found on two idle cores: 1.4 to 1.6 times the
tokens of Tunix with float32 operands, 1.65 to 1.8 with bfloat16, in less than a third of its memory.
"""

import argparse
import datetime
import json
import pathlib
import statistics
import sys
import tempfile

import jax

from distill.models import hf
from distill.models.decoder import Decoder
from tools.workers.serve import Worker, cores, environment, in_turns

_COMMON = {
  "model_type": "llama",
  "hidden_size": 256,
  "intermediate_size": 704,
  "num_attention_heads": 4,
  "num_key_value_heads": 4,
  "head_dim": 64,
  "rms_norm_eps": 1e-5,
  "rope_theta": 1e6,
  "tie_word_embeddings": True,
}
# Keys of config.json by the size of each of the two models.
PAIRS = {
  "5.5M": {**_COMMON, "vocab_size": 8192, "num_hidden_layers": 4, "intermediate_size": 768},
  "14M": {**_COMMON, "vocab_size": 32768, "num_hidden_layers": 7},
}
_AGREE = 1e-3


def main() -> None:
  """Prints a table, and writes the figures."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--pairs", type=lambda text: text.split(","), default=list(PAIRS))
  parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["float32", "bfloat16"])
  parser.add_argument("--out", type=pathlib.Path)
  for name, default in dict(rounds=5, steps=4, batch=8, length=256).items():
    parser.add_argument(f"--{name}", type=int, default=default)
  options = parser.parse_args()
  python = environment("tunix")
  rows = [row for pair in options.pairs for row in _measure(pair, options, python)]
  print(table(rows))
  if options.out:
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    figures = {"date": datetime.date.today().isoformat(), "cores": cores(), "settings": settings, "rows": rows}
    options.out.write_text(json.dumps(figures, indent=1) + "\n")


def _measure(pair: str, options: argparse.Namespace, python: pathlib.Path) -> list[dict]:
  """Figures of each program on one pair, in turns."""
  with tempfile.TemporaryDirectory() as directory:
    parameters = [write(pathlib.Path(directory) / name, pair, seed) for seed, name in enumerate(("student", "teacher"))]
    settings = {
      "directory": directory,
      "vocab": PAIRS[pair]["vocab_size"],
      "batch": options.batch,
      "length": options.length,
      "steps": options.steps,
      "learning_rate": 1e-4,
    }
    workers = {"tunix": Worker("tools.workers.step_tunix", python=python, settings=settings)}
    try:
      for dtype in options.dtypes:
        workers[dtype] = Worker("tools.workers.step", settings={**settings, "dtype": dtype})
      expected = workers["tunix"].ready["loss"]
      for name, worker in workers.items():
        if abs(worker.ready["loss"] / expected - 1) > _AGREE:
          sys.exit(f"{pair}: the loss of {name} is {worker.ready['loss']}, Tunix's {expected}: not the same work")
      print(f"{pair}: {parameters[0] / 1e6:.1f}M parameters each", file=sys.stderr)
      found = in_turns(workers, rounds=options.rounds)
    finally:
      for worker in workers.values():
        worker.close()
  tokens = options.steps * options.batch * options.length
  return [
    {
      "pair": pair,
      "parameters": parameters[0],
      "program": "Tunix" if name == "tunix" else f"distill, {name}",
      "loss": workers[name].ready["loss"],
      "tokens_per_second": tokens / statistics.median([one["seconds"] for one in rounds]),
      "bytes": max(one["bytes"] for one in rounds),
      "faster": statistics.median(
        [theirs["seconds"] / one["seconds"] for theirs, one in zip(found["tunix"], rounds, strict=True)]
      ),
      "memory": max(one["bytes"] for one in rounds) / max(one["bytes"] for one in found["tunix"]),
      "rounds": rounds,
    }
    for name, rounds in found.items()
  ]


def write(directory: pathlib.Path, pair: str, seed: int) -> int:
  """A random model as a checkpoint; its number of parameters."""
  config = hf.config_from_dict(PAIRS[pair], where="config.json")
  decoder = Decoder(config)
  params = decoder.unstack(jax.device_get(jax.jit(decoder.init)(jax.random.key(seed))))
  directory.mkdir()
  hf.save(directory, config=config, params=params)
  return sum(x.size for x in params.values())


def table(rows: list[dict]) -> str:
  """The figures as Markdown."""
  lines = ["| pair | program | tokens/s | against Tunix | memory, MiB | against Tunix |", "|---|---|---|---|---|---|"]
  for row in rows:
    lines.append(
      f"| {row['pair']} | {row['program']} | {row['tokens_per_second']:,.0f} | {row['faster']:.2f} × "
      f"| {row['bytes'] / 2**20:,.0f} | {row['memory']:.2f} × |"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  main()
