"""Writes the BUILD files from the imports of the sources, or with --check says which of them are not up to date.

python tools/build_files.py [--check]
"""

import ast
import pathlib
import sys
from collections.abc import Iterator

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
  "parallel": 1,
  "losses": 2,
  "nn": 3,
  "models": 4,
  "checkpoints": 5,
  "initialise": 5,
  "adapters": 6,
  "data": 6,
  "generate": 7,
  "teachers": 7,
  "objectives": 8,
  "training": 9,
  "evaluation": 10,
  "jobs": 11,
  "cli": 12,
}
TOP = max(FLOORS.values()) + 1  # What stands on the house: recipes, tests, tools and the entry point.
OUTSIDE = ("configs", "tests", "tools")
# Those that benchmarks are measured against: in environments of their own, which tools/bench_peers.sh makes.
PEERS = {"liger_kernel", "trl", "tunix"}
DISTRIBUTIONS = {"absl": "absl_py", "orbax": "orbax_checkpoint", "tensorboardX": "tensorboardx"}


def packages() -> list[pathlib.Path]:
  """Every folder with Python files, from the top."""
  found = {path.parent for top in ("distill", *OUTSIDE) for path in (ROOT / top).rglob("*.py")}
  return sorted(found | {ROOT})


def modules(path: pathlib.Path) -> set[str]:
  """Names of all modules that a file imports, and of all names it imports from them."""
  found: set[str] = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    elif isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
  return found


def deps(path: pathlib.Path) -> Iterator[str]:
  """Labels of what a file imports: the project's own files, and distributions from PyPI."""
  for module in modules(path):
    top = module.split(".")[0]
    target = ROOT.joinpath(*module.split("."))
    if top in ("distill", *OUTSIDE):
      for one in (target.with_suffix(".py"), target / "__init__.py"):
        # A package's empty __init__.py comes with every import below it and needs no naming.
        if one.is_file() and one != path and (one.name != "__init__.py" or one.read_text().strip()):
          yield label(one)
    elif top not in sys.stdlib_module_names and top not in PEERS:
      yield f"@pypi//{DISTRIBUTIONS.get(top, top)}"


def label(path: pathlib.Path) -> str:
  """Bazel's name of a Python file's target."""
  folder = path.parent.relative_to(ROOT)
  name = folder.name if path.name == "__init__.py" else path.stem
  place = "//" if str(folder) == "." else f"//{folder}"
  return place if folder.name == name else f"{place}:{name}"


def above(floor: int) -> str:
  """The group of those that stand higher than `floor`."""
  return f"//distill:floor_{min({TOP, *(one for one in FLOORS.values() if one > floor)})}"


def visibility(package: pathlib.Path) -> list[str]:
  """Who may see a folder's files: its own room and the floors above; the ground floor sees itself."""
  relative = package.relative_to(ROOT)
  if relative.parts[:1] != ("distill",):
    return [f"//distill:floor_{TOP}"]
  if len(relative.parts) == 1 or FLOORS[relative.parts[1]] == 0:
    return ["//distill:floor_0"]
  room = relative.parts[1]
  return [above(FLOORS[room]), f"//distill/{room}:__subpackages__"]


def groups() -> Iterator[str]:
  """The floors as groups of packages, each with those above it."""
  rooms = {name: floor for name, floor in FLOORS.items() if (ROOT / "distill" / name).is_dir()}
  for floor in sorted({0, TOP, *rooms.values()}):
    members = [f"//distill/{name}/..." for name in rooms if rooms[name] == floor]
    # The entry point and the ground floor's files share the package //distill.
    members += {0: ["//distill"], TOP: ["//distill", *(f"//{name}/..." for name in OUTSIDE)]}.get(floor, [])
    higher = [":" + above(floor).split(":")[1]] if floor < TOP else []
    yield _call("package_group", name=f"floor_{floor}", includes=higher, packages=members)


def rule(path: pathlib.Path) -> str:
  """The rule of one file."""
  name = path.parent.name if path.name == "__init__.py" else path.stem
  needs = set(deps(path))
  if path.name.endswith("_test.py"):
    sources = [path.name, "//tests:main.py"]
    needs |= {"//tests:conftest", "@pypi//pytest"}
    arguments = [f"$(location {path.name})"]
    return _call("py_test", name=name, srcs=sources, args=arguments, main="//tests:main.py", deps=sorted(needs))
  kind = "py_binary" if path.name == "__main__.py" else "py_library"
  data = ["**/*"] if path == ROOT / "distill/demo/__init__.py" else []
  return _call(kind, name=name, srcs=[path.name], data=data, deps=sorted(needs))


def _call(kind: str, **fields: str | list[str]) -> str:
  lines = [f"{kind}("]
  for name, value in fields.items():
    if isinstance(value, str):
      lines.append(f'    {name} = "{value}",')
    elif name == "data" and value:
      lines += ["    data = glob(", f'        ["{value[0]}"],', '        exclude = ["*.py"],', "    ),"]
    elif value:
      # Buildifier's order: own package, own repository, others; a package before those in it.
      ordered = sorted(value, key=lambda one: (one[0] == "@", one[:2] == "//", one.replace(":", "!")))
      items = [f'        "{one}",' for one in ordered]
      lines += [f'    {name} = ["{value[0]}"],'] if len(value) == 1 else [f"    {name} = [", *items, "    ],"]
  return "\n".join([*lines, ")"])


def build(package: pathlib.Path) -> str:
  """The BUILD file of a folder; the top one only names the program."""
  if package == ROOT:
    return _call("alias", name="distill", actual="//distill:__main__") + "\n"
  files = [path for path in sorted(package.glob("*.py")) if path.name != "__init__.py" or path.read_text().strip()]
  rules = [rule(path) for path in files]
  kinds = sorted({one.split("(")[0] for one in rules})
  parts = [_call("package", default_visibility=visibility(package))]
  if package == ROOT / "distill":
    parts += groups()
  if package == ROOT / "tests":
    parts.append('exports_files(["main.py"])')
  names = ", ".join(f'"{kind}"' for kind in kinds)
  load = [f'load("@rules_python//python:defs.bzl", {names})'] if kinds else []
  return "\n\n".join([*load, *parts, *rules]) + "\n"


def main() -> int:
  """Writes or checks all of them."""
  texts = {package / "BUILD": build(package) for package in packages()}
  stale = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
  if "--check" not in sys.argv:
    for path in stale:
      path.write_text(texts[path])
  elif stale:
    names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
    print(f"not up to date: {names}; run python tools/build_files.py", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
