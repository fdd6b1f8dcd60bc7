"""The BUILD files against the real imports: nothing missing, nothing more, and no floor open to one below it."""

import ast
import pathlib

import pytest

from tools.build_files import FLOORS

ROOT = pathlib.Path(__file__).parent.parent
BUILDS = sorted(path for top in ("distill", "tests", "configs", "tools") for path in (ROOT / top).rglob("BUILD"))


def rules(path):
  """(kind, {attribute: value}) of every rule in a BUILD file."""
  for node in ast.parse(path.read_text()).body:
    call = node.value
    if call.func.id.startswith("py_"):
      values = {word.arg: word.value for word in call.keywords}
      yield call.func.id, {key: ast.literal_eval(x) for key, x in values.items() if not isinstance(x, ast.Call)}


def label(folder, name):
  place = f"//{folder.relative_to(ROOT)}"
  return place if folder.name == name else f"{place}:{name}"


def every_rule():
  return {label(path.parent, fields["name"]): (path.parent, fields) for path in BUILDS for _, fields in rules(path)}


def modules(source):
  found = set()
  for node in ast.walk(ast.parse(source.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    elif isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
  return found


def module(folder, source):
  parts = (folder / source).relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_file_has_a_rule():
  named = {(folder / source) for folder, fields in every_rule().values() for source in fields["srcs"]}
  for top in ("distill", "tests", "configs", "tools"):
    for path in (ROOT / top).rglob("*.py"):
      assert path in named or not path.read_text().strip(), path


@pytest.mark.parametrize("path", BUILDS, ids=lambda path: str(path.parent.relative_to(ROOT)))
def test_deps_are_the_imports_and_may_be_seen(path):
  everything = every_rule()
  by_module = {module(folder, fields["srcs"][0]): name for name, (folder, fields) in everything.items()}
  for _, fields in rules(path):
    (source,) = fields["srcs"]
    wanted = {by_module[name] for name in modules(path.parent / source) if name in by_module}
    here = label(path.parent, fields["name"])
    assert set(fields.get("deps", ())) - {"//tests:conftest"} == wanted - {here, "//tests:conftest"}, source
    for dep in wanted - {here}:
      seen = everything[dep][1].get("visibility", [])
      folder = str(path.parent.relative_to(ROOT))
      allowed = any(
        entry == "//visibility:public"
        or (entry.endswith(":__subpackages__") and f"{folder}/".startswith(f"{entry[2:].split(':')[0]}/"))
        or entry == f"//{folder}:__pkg__"
        for entry in seen
      )
      assert allowed, f"{here} may not see {dep}"


def test_no_floor_is_visible_from_below():
  for name, (folder, fields) in every_rule().items():
    parts = [*folder.relative_to(ROOT).parts, fields["name"]]
    if parts[0] != "distill" or parts[1] not in FLOORS:
      continue
    for entry in fields["visibility"]:
      seer = entry[2:].split(":")[0].split("/")
      if seer[0] == "distill" and len(seer) > 1 and seer[1] != parts[1]:
        assert FLOORS[seer[1]] >= FLOORS[parts[1]], f"{name} is visible from {entry}"
