"""Writes the BUILD files from the imports of the sources, or with --check says which of them are not up to date.

python tools/build_files.py [--check]
"""

import ast
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLOORS = {
  "errors": 0,
  "types": 0,
  "tree": 0,
  "schedules": 0,
  "parallel": 0,
  "demo": 0,
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
OUTSIDE = ("configs", "tests", "tools")
LOAD = 'load("@rules_python//python:defs.bzl", {})\n'


def packages() -> list[pathlib.Path]:
  """Every folder with Python files, from the top."""
  found = {ROOT, *(ROOT / name for name in OUTSIDE)}
  for top in ("distill", *OUTSIDE):
    found |= {path.parent for path in (ROOT / top).rglob("*.py")}
  return sorted(path for path in found if any(path.glob("*.py")))


def imports(path: pathlib.Path) -> set[pathlib.Path]:
  """The project's own files that a file imports."""
  modules: set[str] = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    elif isinstance(node, ast.Import):
      modules |= {alias.name for alias in node.names}
  found = set()
  for module in modules:
    target = ROOT.joinpath(*module.split("."))
    if module.split(".")[0] in ("distill", *OUTSIDE):
      found |= {one for one in (target.with_suffix(".py"), target / "__init__.py") if one.is_file()}
  # A package's empty __init__.py comes with every import below it and needs no naming.
  return {one for one in found - {path} if one.name != "__init__.py" or one.read_text().strip()}


def label(path: pathlib.Path) -> str:
  """Bazel's name of a Python file's target."""
  folder = path.parent.relative_to(ROOT)
  name = folder.name if path.name == "__init__.py" else path.stem
  place = f"//{'' if str(folder) == '.' else folder}"
  return place if folder.name == name else f"{place}:{name}"


def room(path: pathlib.Path) -> str | None:
  """The room of the house that a file of the library stands in."""
  parts = path.relative_to(ROOT).with_suffix("").parts
  return parts[1] if parts[0] == "distill" and len(parts) > 1 and parts[1] in FLOORS else None


def visibility(path: pathlib.Path) -> list[str]:
  """Who may see a file: its own room, the rooms above, and what stands outside the library."""
  here = room(path)
  outside = [f"//{name}:__subpackages__" for name in OUTSIDE]
  if here is None:
    return ["//visibility:public"]
  floor = FLOORS[here]
  rooms = [name for name in FLOORS if FLOORS[name] > floor or name == here or FLOORS[name] == floor == 0]
  folders = [f"//distill/{name}:__subpackages__" for name in rooms if (ROOT / "distill" / name).is_dir()]
  return [*folders, *outside, "//distill:__pkg__"]


def target(path: pathlib.Path) -> str:
  """The rule of one file."""
  relative = path.relative_to(ROOT)
  kind = "py_library"
  if path.name.endswith("_test.py"):
    kind = "py_test"
  elif path.name == "__main__.py":
    kind = "py_binary"
  deps = [label(one) for one in imports(path)]
  if relative.parts[0] == "tests" and path.name != "conftest.py":
    deps = [*{*deps, "//tests:conftest"}]
  name = path.parent.name if path.name == "__init__.py" else path.stem
  lines = [f"{kind}(", f'    name = "{name}",', f'    srcs = ["{path.name}"],']
  if path == ROOT / "distill/demo/__init__.py":
    lines += ["    data = glob(", '        ["**/*"],', '        exclude = ["*.py"],', "    ),"]
  if kind != "py_test":
    seen = visibility(path)
    lines += _list("visibility", seen)
  lines += _list("deps", deps)
  return "\n".join([*lines, ")"])


def _list(name: str, items: list[str]) -> list[str]:
  if not items:
    return []
  items = sorted(items, key=lambda item: item.replace(":", "!"))  # Buildifier's order: a package before those in it.
  if len(items) == 1:
    return [f'    {name} = ["{items[0]}"],']
  return [f"    {name} = [", *(f'        "{item}",' for item in items), "    ],"]


def build(package: pathlib.Path) -> str:
  """The BUILD file of a folder."""
  files = sorted(package.glob("*.py"))
  files = [path for path in files if path.name != "__init__.py" or path.read_text().strip()]
  rules = [target(path) for path in files]
  kinds = sorted({rule.split("(")[0] for rule in rules})
  head = LOAD.format(", ".join(f'"{kind}"' for kind in kinds)) if kinds else ""
  return "\n".join([head, *("\n" + rule if i else rule for i, rule in enumerate(rules))]) + "\n" if rules else ""


def main() -> int:
  """Writes or checks all of them."""
  stale = []
  for package in packages():
    path, text = package / "BUILD", build(package)
    if not path.exists() or path.read_text() != text:
      stale.append(str(path.relative_to(ROOT)))
      if "--check" not in sys.argv:
        path.write_text(text)
  if "--check" in sys.argv and stale:
    print(f"not up to date: {', '.join(stale)}; run python tools/build_files.py")
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
