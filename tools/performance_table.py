"""Writes the tables of docs/performance.md from the benchmarks' JSON figures.

python -m tools.bench_step --out=docs/figures/step.json
python -m tools.bench_efficiency --out=docs/figures/efficiency.json
python -m tools.bench_loss --out=docs/figures/loss.json     # or several loss*.json
python -m tools.performance_table
"""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

from tools import bench_efficiency, bench_loss, bench_step

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_FIGURES = _ROOT / "docs" / "figures"
_PEERS = {"plain": "plain jax", "liger": "Liger 0.8.5", "trl": "TRL 1.16.0"}


def main() -> None:
  """Rewrites the four tables of docs/performance.md, each between its markers."""
  step, efficiency, losses = (_figures(name) for name in ("step", "efficiency", "loss"))
  page = _ROOT / "docs" / "performance.md"
  _write(page, "summary", _summary(step["rows"], losses["rows"]))
  _write(page, "step", bench_step.table(step["rows"]) + _dated(step))
  _write(page, "efficiency", bench_efficiency.table(efficiency["rows"]) + _dated(efficiency))
  _write(page, "losses", bench_loss.table(losses["rows"]) + _dated(losses))


def _figures(name: str) -> dict[str, Any]:
  """Reads the JSON files of one benchmark; returns the last one with the rows of all."""
  found = [json.loads(path.read_text()) for path in sorted(_FIGURES.glob(f"{name}*.json"))]
  return {**found[-1], "rows": [row for one in found for row in one["rows"]]}


def _dated(figures: dict[str, Any]) -> str:
  return f"\n\n{figures['cores']} cores, {figures['date']}."


def _summary(steps: list[dict[str, Any]], losses: list[dict[str, Any]]) -> str:
  rows = [*_of_steps(steps), *_of_losses(losses)]
  lines = [f"| {what} | {peer} | {faster:.2f} × | {memory:.2f} × |" for what, peer, faster, memory in rows]
  return "\n".join(["| what | against | speed | memory |", "|---|---|---|---|", *lines])


def _of_steps(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, float, float]]:
  """Yields (what, against, speed ratio, memory ratio) of distill's steps against Tunix.

  Each is compared with Tunix in float32, and steps with bfloat16 operands also with Tunix in bfloat16.
  """
  for row in rows:
    program, dtype = row["program"].split(", ")
    if program == "Tunix":
      continue
    for peer in dict.fromkeys((bench_step.REFERENCE, f"Tunix, {dtype}")):
      what, against = f"step, {row['pair']} pair, {dtype} operands", peer.replace("Tunix", "Tunix 0.1.7")
      yield what, against, row["faster"][peer], row["memory"][peer]


def _of_losses(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, float, float]]:
  """Yields (what, against, speed ratio, memory ratio) of distill's losses against other programs.

  Memory is that of XLA's temporaries against plain jax, and the peak of the process against torch programs.
  """
  ours = None
  for row in rows:
    if row["form"] == "chunked":
      ours = row
      continue
    assert ours is not None
    plain = row["form"] == "plain"
    memory = ours["temporaries"][0] / row["temporaries"][0] if plain else ours["peak"] / row["peak"]
    what = f"{row['loss']}, {row['vocab']:,} ids, {row['dtype']}"
    yield what, _PEERS[row["form"]], row["slower"], memory


def _write(path: pathlib.Path, name: str, text: str) -> None:
  begin, end = f"<!-- {name}: tools/performance_table.py writes this -->", f"<!-- end of {name} -->"
  before, rest = path.read_text().split(begin)
  path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}")


if __name__ == "__main__":
  main()
