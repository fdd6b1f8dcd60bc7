"""A file imports from its own folder and from lower floors only."""

import ast
import pathlib

import pytest

from tools.build_files import FLOORS

ROOT = pathlib.Path(__file__).parent.parent / "distill"


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
