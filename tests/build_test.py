"""The BUILD files against the real imports: nothing missing, nothing more, and no floor open to one below it."""

import ast
import dataclasses
import importlib.metadata
import pathlib
import re
import sys

import pytest

from tools.build_files import FLOORS, PEERS

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOPS = ("distill", "tests", "configs", "tools")
BUILDS = sorted(path for top in TOPS for path in (ROOT / top).rglob("BUILD"))
INSTALLED = importlib.metadata.packages_distributions()


@dataclasses.dataclass(frozen=True)
class Rule:
  kind: str
  package: str
  fields: dict

  @property
  def label(self):
    name = self.fields["name"]
    return f"//{self.package}" if self.package.split("/")[-1] == name else f"//{self.package}:{name}"

  @property
  def source(self):
    return ROOT / self.package / self.fields["srcs"][0]


def calls(path):
  """(function, {argument: value}) of every call at the top of a BUILD file."""
  for node in ast.parse(path.read_text()).body:
    fields = {word.arg: word.value for word in node.value.keywords}
    yield (
      node.value.func.id,
      {key: ast.literal_eval(value) for key, value in fields.items() if not isinstance(value, ast.Call)},
    )


def package_of(path):
  return path.parent.relative_to(ROOT).as_posix()


RULES = [Rule(kind, package_of(path), fields) for path in BUILDS for kind, fields in calls(path) if kind[:3] == "py_"]
DEFAULTS = {
  package_of(path): fields["default_visibility"] for path in BUILDS for kind, fields in calls(path) if kind == "package"
}
GROUPS = {fields["name"]: fields for kind, fields in calls(ROOT / "distill/BUILD") if kind == "package_group"}


def members(group):
  """Package patterns of a group and of those it includes."""
  fields = GROUPS[group]
  return {*fields["packages"], *(one for name in fields.get("includes", ()) for one in members(name[1:]))}


def seers(rule):
  """Patterns of the packages that may see a rule."""
  found = {f"//{rule.package}"}
  for entry in rule.fields.get("visibility", DEFAULTS[rule.package]):
    place, name = entry.split(":")
    found |= {f"{place}/..."} if name == "__subpackages__" else members(name)
  return found


def covers(pattern, package):
  return f"//{package}" == pattern or (pattern.endswith("/...") and f"//{package}/".startswith(pattern[:-3]))


def imported(path):
  """Names of the modules that a file imports, and of what it imports from them."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom):
      found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    elif isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
  return found


def module(path):
  return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def requirements(pattern):
  """Normalised names in the part of setup.py that an argument's name matches."""
  (call,) = (
    node
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
  )
  texts = [
    x.value
    for word in call.keywords
    if re.fullmatch(pattern, word.arg)
    for x in ast.walk(word.value)
    if isinstance(x, ast.Constant)
  ]
  return {re.split(r"[<>=!~;\[ ]", text)[0].lower().replace("-", "_") for text in texts}


def test_every_file_has_one_rule():
  named = [rule.source for rule in RULES]
  files = [path for top in TOPS for path in (ROOT / top).rglob("*.py") if path.read_text().strip()]
  assert sorted(named) == sorted(files)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.label)
def test_deps_are_the_imports(rule):
  labels = {module(other.source): other.label for other in RULES}
  names = imported(rule.source)
  ours = {labels[name] for name in names if name in labels} - {rule.label}
  deps = set(rule.fields.get("deps", ()))
  if rule.kind == "py_test":
    assert {"//tests:conftest", "@pypi//pytest"} <= deps
    deps -= {"//tests:conftest", "@pypi//pytest"} - ours
    names |= {"pytest"}
    deps |= {"@pypi//pytest"}
  assert {one for one in deps if one.startswith("//")} == ours
  tops = {name.split(".")[0] for name in names} - set(TOPS) - PEERS - sys.stdlib_module_names
  theirs = [{name.lower().replace("-", "_") for name in INSTALLED[top]} for top in tops]
  named = {one.removeprefix("@pypi//") for one in deps if one.startswith("@pypi//")}
  assert len(named) == len(theirs) and all(named & one for one in theirs), f"{named} for {tops}"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.label)
def test_deps_may_be_seen(rule):
  everything = {other.label: other for other in RULES}
  for dep in rule.fields.get("deps", ()):
    if dep.startswith("//"):
      assert any(covers(pattern, rule.package) for pattern in seers(everything[dep])), f"{dep} is hidden"


@pytest.mark.parametrize(
  "rule",
  [one for one in RULES if "/" in one.package and one.package.startswith("distill/")],
  ids=lambda rule: rule.label,
)
def test_no_floor_is_visible_from_below(rule):
  room = rule.package.split("/")[1]
  for other in {one.package for one in RULES if one.package.startswith("distill")} - {"distill"}:
    if any(covers(pattern, other) for pattern in seers(rule)):
      there = other.split("/")[1]
      assert there == room or FLOORS[there] > FLOORS[room] or FLOORS[there] == FLOORS[room] == 0, other


def test_what_is_imported_is_asked_for_and_locked():
  library, everything = requirements("install_requires"), requirements("install_requires|extras_require")
  for rule in RULES:
    for dep in rule.fields.get("deps", ()):
      if dep.startswith("@pypi//"):
        assert dep.removeprefix("@pypi//") in (library if rule.package.startswith("distill") else everything), (
          f"{rule.label}: setup.py does not ask for {dep}"
        )
  for lock in ROOT.glob("requirements-*.lock"):
    locked = {line.split("==")[0].replace("-", "_") for line in lock.read_text().split()}
    assert everything - {"test", "bench"} <= locked, lock
