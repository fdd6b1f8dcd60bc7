"""Distils the embedded teacher into five architectures with equally many tokens; writes a table of their retention.

    python -m tools.compare_architectures --out=runs/architectures [--kinds=dense,mamba2] [--control=dense] [-- …]

Arguments after `--` are passed to every `distill train`. Finished runs are reused. The results go to `table.md`, and
their figures to `table.json`.
"""

import argparse
import datetime
import json
import pathlib
import subprocess
import sys

from configs.architectures import STUDENTS
from distill.demo import ROOT, SKILLS
from distill.evaluation.model import STUDENT

_CONFIG = "configs/architectures.py"


def main() -> None:
  """Runs the missing trainings, then writes the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/architectures"))
  parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(STUDENTS))
  parser.add_argument(
    "--control",
    type=lambda text: text.split(","),
    default=["dense"],
    help="kinds that are also trained by cross-entropy alone",
  )
  arguments, train = parser.parse_known_args()
  train = [one for one in train if one != "--"]
  variants = [*arguments.kinds, *(f"{kind},control" for kind in arguments.control)]
  rows = {}
  for number, variant in enumerate(variants, start=1):
    print(f"[{number}/{len(variants)}] {variant}", flush=True)
    config, out = f"{_CONFIG}:{variant}", arguments.out / variant.replace(",", "_")
    rows[variant] = measured(config, out=out, train=train)
  (arguments.out / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
  text = _table(rows)
  (arguments.out / "table.md").write_text(text)
  print(text)


def measured(config: str, *, out: pathlib.Path, train: list[str]) -> dict:
  """Trains a recipe's student and compares it with the embedded teacher, unless done; returns report and cost."""
  path = out / "report" / "report.json"
  if not path.exists():
    adapters = ",".join(str(ROOT / "adapters" / skill) for skill in SKILLS)
    distill("train", f"--config={config}", f"--workdir={out}", *train)
    distill(
      "compare",
      f"--student={out / 'student'}",
      f"--teacher={ROOT / 'teacher'}",
      f"--adapters={adapters}",
      f"--config={config}",
      f"--out={path.parent}",
    )
  lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
  return {
    "report": json.loads(path.read_text()),
    "tokens": sum(line["tokens"] for line in lines),
    "seconds": sum(line["tokens"] / line["tokens_per_second"] for line in lines),
  }


def distill(*arguments: str) -> None:
  """Runs `distill` with these arguments in its own process, and raises an error if it fails."""
  subprocess.run([sys.executable, "-m", "distill", *arguments], check=True)


def retained(report: dict) -> list[str]:
  """Returns table cells: retention of every skill, and KL and top-1 agreement on held-out text."""
  skills = {row["skill"]: row["retention"] for row in report["skills"] if row["role"] == STUDENT}
  heldout = next(row for row in report["fidelity"] if row["role"] == STUDENT)
  return [
    *(f"{one['value']:.0%} ({one['low']:.0%} to {one['high']:.0%})" for one in (skills[name] for name in SKILLS)),
    f"{heldout['kl']:.3f}",
    f"{heldout['top1_agreement']:.1%}",
  ]


def _table(rows: dict[str, dict]) -> str:
  head = ["student", "HF class family", "parameters", *SKILLS, "KL, nats", "top-1", "tokens", "minutes"]
  lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
  for variant, row in rows.items():
    student = next(model for model in row["report"]["models"] if model["role"] == STUDENT)
    cells = [
      variant.replace("_", " ").replace(",", ", "),
      f"`{student['family']}`",
      f"{student['parameters'] / 1e6:.2f}M",
      *retained(row["report"]),
      f"{row['tokens']:,.0f}",
      f"{row['seconds'] / 60:.1f}",
    ]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join([*lines, "", f"{datetime.date.today().isoformat()}.", ""])


if __name__ == "__main__":
  main()
