"""Benchmarks caches of the embedded teacher: size on disk, retention of the student, and time of a step.

    python -m tools.bench_cache [--out=runs/cache] [--kinds=live,top_k-16,sampled-12] [--rounds=6] [--steps=10]

The same student is trained by forward KL from the live teacher, by forward KL from each teacher cache, and by
cross-entropy (control). Finished caches and runs are reused. Then training steps from the first cache and training
steps of cross-entropy are timed alternately, including the time to read batches. The results go to `table.md`, and
their figures to `table.json`. Expected: with top_k-64 the same retention as with the live teacher, within the
confidence intervals, and steps that take at most 1.10 times as long as those of cross-entropy.
"""

import argparse
import datetime
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Callable

import jax

from distill.cli.configuration import load
from distill.demo import SKILLS
from distill.jobs import stage_state
from distill.jobs.config import RunConfig
from distill.jobs.prepare import prepare
from distill.jobs.run_directory import RunDirectory
from distill.jobs.train import compile_step, teacher_params
from distill.teachers.sections import open_sections
from distill.training import loop
from tools.compare_architectures import distill, measured, retained

_CONFIG = "configs/cached.py"
_KINDS = ("live", "top_k-64", "sampled-50", "control")


def main() -> None:
  """Creates the missing caches, trains the missing students, times steps, and writes the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/cache"))
  parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(_KINDS))
  parser.add_argument("--rounds", type=int, default=6)
  parser.add_argument("--steps", type=int, default=10, help="training steps of each kind in a round")
  arguments = parser.parse_args()
  rows = {}
  for number, kind in enumerate(arguments.kinds, start=1):
    print(f"[{number}/{len(arguments.kinds)}] {kind}", flush=True)
    rows[kind] = _row(kind, out=arguments.out)
  (arguments.out / "table.md").write_text(_table(rows))
  cache = next((arguments.out / kind / "cache" for kind in arguments.kinds if "-" in kind), None)
  times = _times(cache, rounds=arguments.rounds, steps=arguments.steps) if cache else {}
  text = _table(rows) + (_ratio(times) if times else "")
  (arguments.out / "table.json").write_text(json.dumps({"rows": rows, "seconds": times}, indent=1) + "\n")
  (arguments.out / "table.md").write_text(text)
  print(text)


def _row(kind: str, *, out: pathlib.Path) -> dict:
  store = f"--config.data.store={out / 'tokens'}"
  if "-" not in kind:
    variant = ":control" if kind == "control" else ""
    return {"bytes": 0.0, **measured(f"{_CONFIG}{variant}", out=out / kind / "run", train=[store])}
  targets, size = kind.rsplit("-", 1)
  cache = out / kind / "cache"
  overrides = [f"--config.teacher_cache.targets={targets}", f"--config.teacher_cache.size={size}", store]
  distill("cache", f"--config={_CONFIG}", f"--workdir={cache}", *overrides)
  row = measured(_CONFIG, out=out / kind / "run", train=[*overrides, f"--config.teacher.cache={cache}"])
  return {"bytes": _bytes(cache), **row}


def _bytes(cache: pathlib.Path) -> float:
  """Returns the size of a cache on disk, in bytes for each token."""
  found = open_sections(cache)
  size = sum(path.stat().st_size for section in found for path in section.directory.iterdir())
  return size / sum(section.count * section.manifest["length"] for section in found)


def _times(cache: pathlib.Path, *, rounds: int, steps: int) -> dict[str, list[float]]:
  """Returns, for "cached" and "cross_entropy", the seconds that `steps` training steps take in each round."""
  store = str(cache.parent.parent / "tokens")
  targets, size = cache.parent.name.rsplit("-", 1)
  made = {"teacher.cache": str(cache), "teacher_cache.targets": targets, "teacher_cache.size": size}
  overrides: dict[str, dict[str, str]] = {"cached": made, "cross_entropy": {}}
  advance: dict[str, Callable[[int], None]] = {}
  for name, change in overrides.items():
    config = f"{_CONFIG}{':control' if name == 'cross_entropy' else ''}"
    loaded = load(config, overrides={"data.store": store, **change})
    advance[name] = _advance(loaded, workdir=cache.parent.parent / f"timed_{name}")
  times: dict[str, list[float]] = {name: [] for name in advance}
  for turn in range(rounds + 1):
    for name, run in advance.items():
      start = time.perf_counter()
      run(steps)
      if turn:  # The first compiles.
        times[name].append(time.perf_counter() - start)
  return times


def _advance(config: RunConfig, *, workdir: pathlib.Path) -> Callable[[int], None]:
  """Returns a function that trains a run for a number of further steps, its argument."""
  training, params = prepare(config, directory=RunDirectory(workdir))
  (stage,) = training.stages
  state, optimizer = stage_state.begin(training, stage, params)
  step = compile_step(training, stage, state, optimizer)
  quiet = loop.Hooks(log=lambda at, values: None, save=lambda state, at: None, save_after=lambda at: False, stop=bool)
  done = 0

  def advance(steps: int) -> None:
    nonlocal state, done
    state, done = loop.run(
      state,
      step=step,
      teacher_params=teacher_params(training, stage),
      source=training.batches[stage.name],
      mesh=training.mesh,
      start=done,
      steps=done + steps,
      hooks=quiet,
    )
    jax.block_until_ready(state.trained)

  return advance


def _ratio(times: dict[str, list[float]]) -> str:
  pairs = zip(times["cached"], times["cross_entropy"], strict=True)
  ratio = statistics.median(itertools.starmap(lambda one, other: one / other, pairs))
  medians = {name: statistics.median(values) for name, values in times.items()}
  return (
    f"\nSteps from the cache take {ratio:.3f} times those of cross-entropy "
    f"({len(times['cached'])} rounds in turn; medians {medians['cached']:.2f} and {medians['cross_entropy']:.2f} s).\n"
  )


def _table(rows: dict[str, dict]) -> str:
  head = ["targets", "bytes a token", *SKILLS, "KL, nats", "top-1"]
  lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
  for kind, row in rows.items():
    size = f"{row['bytes']:.1f}" if row["bytes"] else "none"
    lines.append("| " + " | ".join([kind, size, *retained(row["report"])]) + " |")
  return "\n".join([*lines, "", f"{datetime.date.today().isoformat()}.", ""])


if __name__ == "__main__":
  main()
