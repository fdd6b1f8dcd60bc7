"""Files import only from their own package and from packages on lower floors, without cycles."""

import ast
import graphlib
import pathlib

import pytest

from tools.build_files import FLOORS

ROOT = pathlib.Path(__file__).resolve().parent.parent / "distill"
FILES = {".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path for path in ROOT.rglob("*.py")}


def imported(path):
  """Returns the modules of distill that a file imports, or from which it imports a name."""
  modules = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path}: relative import"
      modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    elif isinstance(node, ast.Import):
      modules |= {alias.name for alias in node.names}
  return modules & set(FILES)


@pytest.mark.parametrize("name", [name for name in FILES if name.split(".")[1] in FLOORS])
def test_files_import_only_from_their_own_package_and_packages_below_it(name):
  here = name.split(".")[1]
  for other in {module.split(".")[1] for module in imported(FILES[name])} - {here}:
    lower = FLOORS[other] < FLOORS[here] or FLOORS[other] == FLOORS[here] == 0
    assert lower, f"{name} (floor {FLOORS[here]}) imports distill.{other} (floor {FLOORS[other]})"


def test_every_package_of_the_library_has_a_floor_in_FLOORS():
  rooms = {name.split(".")[1] for name in FILES} - {"__init__", "__main__"}
  assert rooms <= set(FLOORS)


def test_imports_of_the_library_have_no_cycle():
  graphlib.TopologicalSorter({name: imported(path) for name, path in FILES.items()}).prepare()
