"""Benchmarks a training step against Tunix's: tokens a second and memory, in turns, in separate processes.

    tools/bench_peers.sh tunix
    python -m tools.bench_step [--pairs=5.5M,14M] [--rounds=5] [--steps=4] [--dtypes=float32,bfloat16] [--out=PATH]

Teacher and student are two random Llamas of one size, written once and loaded by both programs. Batches are random
tokens [8, 256], the loss is half forward KL and half cross-entropy, and the optimizer is AdamW. Tunix runs its own
`DistillationTrainer` and its own Llama, with one dtype for weights, moments, operands and losses. distill has float32
weights, moments and losses, and --dtypes sets the dtype of its operands. The losses of the first step must agree.
Memory is the peak of the process during steps, less what it held before it loaded the models. Tables go to stdout; with
--out the figures are also written as JSON.

Measured on two idle cores, in tokens per second: with float32 operands 1.4 to 1.5 times Tunix in float32; with bfloat16
operands 2.3 to 2.5 times Tunix in float32, and 1.9 to 2.2 times Tunix in bfloat16, in 0.17 to 0.32 of the memory.
"""

import argparse
import datetime
import json
import pathlib
import statistics
import sys
import tempfile

import jax

from distill.checkpoints import hf, hf_config
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
REFERENCE = "Tunix, float32"
# Of the losses with that of Tunix in float32; Tunix in bfloat16 sums them in that.
_AGREE = 1e-3
_AGREE_BFLOAT16 = 1e-2


def main() -> None:
  """Prints a table of speeds and memory, and with --out writes its figures as JSON."""
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
  """Measures distill and Tunix on one pair of models, in rounds in which they take turns; returns a row per program."""
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
    workers: dict[str, Worker] = {}
    try:
      for dtype in sorted({"float32", *options.dtypes}, reverse=True):
        workers[f"Tunix, {dtype}"] = Worker(
          "tools.workers.step_tunix", python=python, settings={**settings, "dtype": dtype}
        )
      for dtype in options.dtypes:
        workers[f"distill, {dtype}"] = Worker("tools.workers.step", settings={**settings, "dtype": dtype})
      expected = workers[REFERENCE].ready["loss"]
      for name, worker in workers.items():
        found, most = worker.ready["loss"], _AGREE_BFLOAT16 if name == "Tunix, bfloat16" else _AGREE
        if abs(found / expected - 1) > most:
          sys.exit(
            f"{pair}: the loss of {name} is {found}, but that of {REFERENCE} is {expected}, so they do not compute the "
            "same; correct the worker"
          )
      print(f"{pair}: {parameters[0] / 1e6:.1f}M parameters each", file=sys.stderr)
      found = in_turns(workers, rounds=options.rounds)
    finally:
      for worker in workers.values():
        worker.close()
  tokens = options.steps * options.batch * options.length
  peers = [name for name in found if name.startswith("Tunix")]
  most = {name: max(one["bytes"] for one in rounds) for name, rounds in found.items()}
  return [
    {
      "pair": pair,
      "parameters": parameters[0],
      "program": name,
      "loss": workers[name].ready["loss"],
      "tokens_per_second": tokens / statistics.median([one["seconds"] for one in rounds]),
      "bytes": most[name],
      "faster": {peer: _faster(rounds, found[peer]) for peer in peers},
      "memory": {peer: most[name] / most[peer] for peer in peers},
      "rounds": rounds,
    }
    for name, rounds in found.items()
  ]


def _faster(rounds: list[dict], peer: list[dict]) -> float:
  """Returns the median over rounds of a program's speed divided by that of `peer`."""
  return statistics.median([theirs["seconds"] / one["seconds"] for theirs, one in zip(peer, rounds, strict=True)])


def write(directory: pathlib.Path, pair: str, seed: int) -> int:
  """Writes a random model, with the keys of `PAIRS[pair]`, as a checkpoint; returns its number of parameters."""
  config = hf_config.config_from_dict(PAIRS[pair], where="config.json")
  decoder = Decoder(config)
  params = decoder.unstack(jax.device_get(jax.jit(decoder.init)(jax.random.key(seed))))
  directory.mkdir()
  hf.save(directory, config=config, params=params)
  return sum(x.size for x in params.values())


def table(rows: list[dict]) -> str:
  """Returns the rows of figures from `_measure` as a Markdown table."""
  peers = list(rows[0]["faster"])
  columns = [
    "pair",
    "program",
    "tokens/s",
    *(f"to {peer}" for peer in peers),
    "MiB",
    *(f"MiB to {peer}" for peer in peers),
  ]
  lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
  for row in rows:
    faster, memory = ([f"{row[key][peer]:.2f} ×" for peer in peers] for key in ("faster", "memory"))
    cells = [
      row["pair"],
      row["program"],
      f"{row['tokens_per_second']:,.0f}",
      *faster,
      f"{row['bytes'] / 2**20:,.0f}",
      *memory,
    ]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


if __name__ == "__main__":
  main()
