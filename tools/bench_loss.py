"""Benchmarks losses over a large vocabulary, forward and backward, against plain jax, Liger and TRL.

    tools/bench_peers.sh torch
    python -m tools.bench_loss [--vocabs=32768,128256] [--tokens=4096] [--width=1024] [--dtypes=float32,bfloat16]
      [--rounds=3] [--out=PATH] [--no-peers]

Each program computes the mean divergence from hidden states and heads, and its gradients by the student's hidden states
and head. All get the same inputs, each in its own process. Forward KL is compared with plain jax; JSD(0.5) is compared
with plain jax, and with Liger's chunked loss and TRL's GKD loss, unmodified, in torch on the CPU. Losses and gradient
norms must agree. A program that does not fit into memory is left out.

`temporaries` is the temporary memory of XLA's compiled program, for --tokens and for twice as many tokens. `peak` is
the peak memory of the process beyond what it held before, including the gradients. Tables go to stdout; with --out the
figures are also written as JSON. Measured on two idle cores in float32, against plain jax: at most a twelfth of the
temporaries, in 0.97 to 1.0 of the time for forward KL and 0.7 to 1.0 for JSD. Speed against others: 1.8 times Liger's,
2.6 times TRL's.
"""

import argparse
import datetime
import itertools
import json
import math
import pathlib
import statistics
import sys

from tools.workers.serve import Worker, cores, environment, in_turns

# Programs by the divergence they compute.
FORMS = {"forward_kl": ("chunked", "plain"), "jsd": ("chunked", "plain", "liger", "trl")}
_TORCH = ("liger", "trl")
# How far values and norms may lie apart; torch rounds logits and log-probabilities to bfloat16 as well.
_AGREE = {"float32": 1e-3, "bfloat16": 0.15}


def main() -> None:
  """Prints a table of times and memory, and with --out writes its figures as JSON."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--vocabs", type=lambda text: [int(one) for one in text.split(",")], default=[32768, 128256])
  parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["float32", "bfloat16"])
  parser.add_argument("--losses", type=lambda text: text.split(","), default=list(FORMS))
  parser.add_argument("--no-peers", dest="peers", action="store_false")
  parser.add_argument("--out", type=pathlib.Path)
  for name, default in dict(tokens=4096, width=1024, rounds=3).items():
    parser.add_argument(f"--{name}", type=int, default=default)
  options = parser.parse_args()
  rows = []
  for vocab, dtype, loss in itertools.product(options.vocabs, options.dtypes, options.losses):
    rows += _measure(vocab, dtype, loss, options)
    print(table(rows), flush=True)
    if options.out:
      settings = {key: value for key, value in vars(options).items() if key != "out"}
      figures = {"date": datetime.date.today().isoformat(), "cores": cores(), "settings": settings, "rows": rows}
      options.out.write_text(json.dumps(figures, indent=1) + "\n")


def _measure(vocab: int, dtype: str, loss: str, options: argparse.Namespace) -> list[dict]:
  """Measures every program that computes `loss`, in rounds in which the programs take turns; returns a row for each."""
  print(f"{loss}, {vocab} ids, {dtype}", file=sys.stderr)
  common = {"vocab": vocab, "dtype": dtype, "loss": loss, "tokens": options.tokens, "width": options.width}
  forms = [form for form in FORMS[loss] if options.peers or form not in _TORCH]
  workers: dict[str, Worker] = {}
  try:
    for form in forms:
      theirs = {"module": "tools.workers.losses_torch", "python": environment("torch")}
      ours = {"module": "tools.workers.losses"}
      workers[form] = Worker(**(theirs if form in _TORCH else ours), settings={**common, "form": form})
      if not workers[form].ready["fits"]:
        workers.pop(form).close()
        print(f"  {form} does not fit", file=sys.stderr)
        continue
      _check(workers[form].ready, workers["chunked"].ready, within=_AGREE[dtype], what=f"{form}, {loss}, {dtype}")
    found = in_turns(workers, rounds=options.rounds)
  finally:
    for worker in workers.values():
      worker.close()
  ours = found["chunked"]
  return [
    {
      **common,
      "form": form,
      "value": workers[form].ready["value"],
      "seconds": statistics.median([one["seconds"] for one in rounds]),
      "slower": statistics.median([one["seconds"] / mine["seconds"] for mine, one in zip(ours, rounds, strict=True)]),
      "temporaries": [workers[form].ready.get(name) for name in ("temporaries", "temporaries_twice")],
      "peak": max(one["bytes"] for one in rounds),
      "rounds": rounds,
    }
    for form, rounds in found.items()
  ]


def _check(ready: dict, expected: dict, *, within: float, what: str) -> None:
  pairs = zip([ready["value"], *ready["norms"]], [expected["value"], *expected["norms"]], strict=True)
  if not all(math.isclose(one, other, rel_tol=within) for one, other in pairs):
    sys.exit(
      f"{what}: loss {ready['value']} and gradient norms {ready['norms']} differ from distill's {expected['value']} "
      f"and {expected['norms']}, so the programs do not compute the same; correct the worker"
    )


def table(rows: list[dict]) -> str:
  """Returns the rows of figures from `_measure` as a Markdown table."""
  lines = [
    "| loss | V | dtype | program | seconds | of ours | temporaries, MiB: tokens, twice | peak, MiB |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    temporaries = ", ".join(f"{size / 2**20:,.0f}" for size in row["temporaries"] if size is not None)
    lines.append(
      f"| {row['loss']} | {row['vocab']:,} | {row['dtype']} | {row['form']} | {row['seconds']:.2f} "
      f"| {row['slower']:.2f} × | {temporaries} | {row['peak'] / 2**20:,.0f} |"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  main()
