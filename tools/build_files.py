"""Writes the BUILD files from the imports of the sources, or with --check lists those that are out of date.

A package of the library is one py_library, and the tests of a folder are one py_test.

python tools/build_files.py [--check]
"""

import ast
import functools
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLOORS = {
  "errors": 0,
  "configuration": 0,
  "kernels": 0,
  "types": 0,
  "tree": 0,
  "schedules": 0,
  "demo": 0,
  "files": 1,
  "axes": 0,
  "parallel": 1,
  "losses": 2,
  "nn": 3,
  "models": 4,
  "checkpoints": 5,
  "initialise": 5,
  "adapters": 6,
  "data": 6,
  "generation": 7,
  "planning": 7,
  "teachers": 7,
  "objectives": 8,
  "training": 9,
  "evaluation": 10,
  "jobs": 11,
  "cli": 12,
}
TOP = max(FLOORS.values()) + 1  # What stands on the house: recipes, tests, tools and the entry point.
OUTSIDE = ("configs", "tests", "tools")
DATA = (".json", ".jsonl", ".safetensors")  # Suffixes of files that code or tests read from their own package.
# Those that benchmarks are measured against: in environments of their own, which tools/bench_peers.sh makes.
PEERS = {"liger_kernel", "trl", "tunix"}
DISTRIBUTIONS = {"absl": "absl_py", "orbax": "orbax_checkpoint", "tensorboardX": "tensorboardx"}


@functools.cache
def folders() -> list[pathlib.Path]:
  """Returns every folder that has a BUILD file: the repository's root, the packages, and each folder of tests."""
  found = [path for top in ("distill", *OUTSIDE) for path in (ROOT / top, *(ROOT / top).glob("*/"))]
  found += (ROOT / "tests").glob("*/*/")
  return [ROOT, *sorted(path for path in found if sources(path))]


@functools.cache
def sources(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the Python files that a folder's BUILD file lists; empty files are left out."""
  relative = folder.relative_to(ROOT).parts
  # Below a package of the library or of tools all is one target; its subfolders may import each other.
  deep = len(relative) == 2 and relative[0] != "tests"
  found = sorted(folder.glob("**/*.py" if deep else "*.py"))
  return [path for path in found if path.read_text().strip()]


def modules(path: pathlib.Path) -> set[str]:
  """Returns the names of all modules that a file imports, and `module.name` of each name imported from a module."""
  found: set[str] = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    elif isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
  return found


def dependencies(paths: Iterable[pathlib.Path]) -> set[str]:
  """Returns the Bazel labels of everything that `paths` import: the project's targets and distributions from PyPI."""
  found = set()
  for module in {name for path in paths for name in modules(path)}:
    top = module.split(".")[0]
    if top in ("distill", *OUTSIDE):
      target = ROOT.joinpath(*module.split("."))
      files = (target.with_suffix(".py"), target / "__init__.py")
      found |= {label(one) for one in files if one.is_file() and one.read_text().strip()}
    elif top not in sys.stdlib_module_names and top not in PEERS:
      found.add(f"@pypi//{DISTRIBUTIONS.get(top, top)}")
  return found


def owner(path: pathlib.Path) -> pathlib.Path:
  """Returns the folder whose BUILD file lists the file `path`."""
  known = set(folders())
  return next(parent for parent in path.parents if parent in known)


def label(path: pathlib.Path) -> str:
  """Returns the label of the build target that the file `path` belongs to."""
  return f"//{owner(path).relative_to(ROOT)}" + (":__main__" if path.name == "__main__.py" else "")


def above(floor: int) -> str:
  """Returns the label of the package group of all floors higher than `floor` (a layer of packages, as in `FLOORS`)."""
  return f"//distill:floor_{min({TOP, *(one for one in FLOORS.values() if one > floor)})}"


def visibility(folder: pathlib.Path) -> str:
  """Returns the package group that may depend on a folder's targets: the floors above, for floor 0 also floor 0."""
  relative = folder.relative_to(ROOT).parts
  if relative[0] != "distill":
    return f"//distill:floor_{TOP}"
  floor = FLOORS[relative[1]] if len(relative) > 1 else 0
  return above(floor) if floor else "//distill:floor_0"


def groups() -> Iterator[str]:
  """Yields a `package_group` rule for each floor; it includes the group of the next higher floor."""
  rooms = {name: floor for name, floor in FLOORS.items() if (ROOT / "distill" / name).is_dir()}
  for floor in sorted({0, TOP, *rooms.values()}):
    members = [f"//distill/{name}" for name in rooms if rooms[name] == floor]
    # The entry point and the ground floor's files share the package //distill.
    members += {0: ["//distill"], TOP: ["//distill", *(f"//{name}/..." for name in OUTSIDE)]}.get(floor, [])
    higher = [":" + above(floor).split(":")[1]] if floor < TOP else []
    yield _call("package_group", name=f"floor_{floor}", includes=higher, packages=members)


def rules(folder: pathlib.Path) -> Iterator[str]:
  """Yields the rules of a folder's BUILD file: py_binary, py_library and py_test, as far as it has such files."""
  found = sources(folder)
  tests = [path for path in found if path.name.endswith("_test.py")]
  programs = [path for path in found if path.name == "__main__.py"]
  library = sorted({*found} - {*tests, *programs})
  pattern = "**/*.py" if any(path.parent != folder for path in library) else "*.py"
  here = f"//{folder.relative_to(ROOT)}"
  read = any(path.suffix in DATA and owner(path) == folder for path in folder.rglob("*"))
  data = _glob("**", exclude=["**/*.py"]) if read else ""
  if programs:
    yield _call("py_binary", name="__main__", srcs=["__main__.py"], deps=dependencies(programs))
  if library:
    left_out = [*(["*_test.py"] if tests else []), *(path.name for path in programs)]
    yield _call(
      "py_library",
      name=folder.name,
      srcs=_glob(pattern, exclude=left_out),
      data="" if tests else data,
      deps=dependencies(library) - {here},
    )
  if tests:
    yield _call(
      "py_test",
      name="test",
      srcs=_glob("*_test.py") + ' + ["//tests:main.py"]',
      args=[here.removeprefix("//")],
      data=data,
      main="//tests:main.py",
      deps=dependencies(tests) | {"//tests", "@pypi//pytest"},
    )


def _glob(pattern: str, *, exclude: Sequence[str] = ()) -> str:
  """Returns a glob expression as buildifier formats it."""
  if not exclude:
    return f'glob(["{pattern}"])'
  return f'glob(\n        ["{pattern}"],\n        exclude = {json.dumps(exclude)},\n    )'


def _call(function: str, **fields: str | Iterable[str]) -> str:
  """Returns a call in a BUILD file as text; glob expressions are not quoted, and empty fields are left out."""
  lines = [f"{function}("]
  for name, value in fields.items():
    if isinstance(value, str):
      lines += [f"    {name} = {value}," if value.startswith("glob(") else f'    {name} = "{value}",'] if value else []
      continue
    # Buildifier's order: own package, own repository, others; a package before those in it.
    ordered = sorted(value, key=lambda one: (one[0] == "@", one[:2] == "//", one.replace(":", "!")))
    if len(ordered) == 1:
      lines.append(f'    {name} = ["{ordered[0]}"],')
    elif ordered:
      lines += [f"    {name} = [", *(f'        "{one}",' for one in ordered), "    ],"]
  return "\n".join([*lines, ")"])


def build(folder: pathlib.Path) -> str:
  """Returns the text of a folder's BUILD file; that of the repository's root only has an alias of the program."""
  if folder == ROOT:
    return _call("alias", name="distill", actual="//distill:__main__") + "\n"
  found = list(rules(folder))
  names = ", ".join(f'"{kind}"' for kind in sorted({one.split("(")[0] for one in found}))
  parts = [f'load("@rules_python//python:defs.bzl", {names})']
  parts.append(_call("package", default_visibility=[visibility(folder)]))
  if folder == ROOT / "distill":
    parts += groups()
  if folder == ROOT / "tests":
    parts.append('exports_files(["main.py"])')
  return "\n\n".join([*parts, *found]) + "\n"


def main() -> int:
  """Writes all BUILD files, or with --check lists those out of date; returns the exit code."""
  texts = {folder / "BUILD": build(folder) for folder in folders()}
  extra = {path for top in ("distill", *OUTSIDE) for path in (ROOT / top).rglob("BUILD")} - set(texts)
  stale = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
  if "--check" not in sys.argv:
    for path in stale:
      path.write_text(texts[path])
    for path in extra:
      path.unlink()
  elif stale or extra:
    names = ", ".join(str(path.relative_to(ROOT)) for path in sorted([*stale, *extra]))
    print(f"{names}: not up to date with the imports; run python tools/build_files.py", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
