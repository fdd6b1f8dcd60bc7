"""A file imports from its own folder and from lower floors only."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent / "distill"
FLOORS = {
  "errors": 0,
  "types": 0,
  "tree": 0,
  "schedules": 0,
  "parallel": 0,
  "losses": 1,
  "nn": 2,
  "models": 3,
  "adapters": 4,
  "data": 5,
  "generate": 5,
  "teachers": 6,
  "training": 7,
  "evaluation": 7,
  "export": 7,
  "cli": 8,
}


def room(path: pathlib.Path) -> str:
  return path.relative_to(ROOT).with_suffix("").parts[0]


def imported_rooms(path: pathlib.Path) -> set[str]:
  modules = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    elif isinstance(node, ast.Import):
      modules |= {alias.name for alias in node.names}
  return {module.split(".")[1] for module in modules if module.startswith("distill.")}


@pytest.mark.parametrize("path", [p for p in ROOT.rglob("*.py") if p.parent != ROOT or p.stem in FLOORS], ids=str)
def test_imports_never_climb(path):
  here = room(path)
  for other in imported_rooms(path) - {here}:
    lower = FLOORS[other] < FLOORS[here] or FLOORS[other] == FLOORS[here] == 0
    assert lower, f"{path} (floor {FLOORS[here]}) imports distill.{other} (floor {FLOORS[other]})"
