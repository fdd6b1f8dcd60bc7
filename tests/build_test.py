"""The deps in BUILD files are exactly the imports of their sources, and packages are visible only to higher floors."""

import ast
import dataclasses
import graphlib
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


def calls(path):
  """Yields (function, {argument: value}) for every call in a BUILD file; a glob becomes the list of files found."""

  def value(node):
    match node:
      case ast.Call():  # glob(patterns, exclude = patterns)
        patterns = [ast.literal_eval(one) for one in (*node.args, *(word.value for word in node.keywords))]
        found, left_out = ({file for one in part for file in path.parent.glob(one)} for part in (*patterns, [], [])[:2])
        return sorted(str(file.relative_to(path.parent)) for file in found - left_out if file.is_file())
      case ast.BinOp():
        return value(node.left) + value(node.right)
    return ast.literal_eval(node)

  for node in ast.parse(path.read_text()).body:
    yield node.value.func.id, {word.arg: value(word.value) for word in node.value.keywords}


@dataclasses.dataclass(frozen=True)
class Target:
  package: str
  visible_to: str
  fields: dict

  @property
  def label(self):
    name = self.fields["name"]
    return f"//{self.package}" if self.package.split("/")[-1] == name else f"//{self.package}:{name}"

  @property
  def files(self):
    return [ROOT / self.package / name for name in self.fields["srcs"] if not name.startswith("//")]


def targets(path):
  """Yields the targets that a BUILD file defines."""
  package = path.parent.relative_to(ROOT).as_posix()
  found = list(calls(path))
  (defaults,) = (fields for function, fields in found if function == "package")
  for function, fields in found:
    if function.startswith("py_"):
      yield Target(package, defaults["default_visibility"][0].split(":")[1], fields)


TARGETS = [target for path in BUILDS for target in targets(path)]
LABELS = {target.label: target for target in TARGETS}
GROUPS = {fields["name"]: fields for function, fields in calls(ROOT / "distill/BUILD") if function == "package_group"}


def members(group):
  """Returns the package patterns of a package group and of the groups that it includes."""
  fields = GROUPS[group]
  return {*fields["packages"], *(one for name in fields.get("includes", ()) for one in members(name[1:]))}


def sees(package, target):
  """Returns True if the visibility of `target` lets `package` depend on it."""
  patterns = {f"//{target.package}", *members(target.visible_to)}
  return any(
    f"//{package}" == one or (one.endswith("/...") and f"//{package}/".startswith(one[:-3])) for one in patterns
  )


def imported(path):
  """Returns the names of the modules that a file imports, and `module.name` of each name imported from a module."""
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
  """Returns normalised distribution names from the arguments of setup() in setup.py whose names match `pattern`."""
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


def test_every_python_file_is_in_exactly_one_build_target():
  named = [path for target in TARGETS for path in target.files if path.read_text().strip()]
  assert sorted(named) == sorted(
    path for top in TOPS for path in (ROOT / top).rglob("*.py") if path.read_text().strip()
  )


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
def test_the_deps_of_a_build_target_are_exactly_the_imports_of_its_files(target):
  owners = {module(path): other.label for other in TARGETS for path in other.files}
  names = {name for path in target.files for name in imported(path)}
  ours = {owners[name] for name in names if name in owners}
  deps = set(target.fields.get("deps", ()))
  if target.fields["name"] == "test":
    assert {"//tests", "@pypi//pytest"} <= deps
    ours |= {"//tests"}
    names |= {"pytest"}
  assert {one for one in deps if one.startswith("//")} == ours - {target.label}
  tops = {name.split(".")[0] for name in names} - set(TOPS) - PEERS - sys.stdlib_module_names
  theirs = [{name.lower().replace("-", "_") for name in INSTALLED[top]} for top in tops]
  named = {one.removeprefix("@pypi//") for one in deps if one.startswith("@pypi//")}
  assert len(named) == len(theirs) and all(named & one for one in theirs), f"{named} for {tops}"


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
def test_the_deps_of_a_build_target_are_visible_to_it(target):
  for dep in target.fields.get("deps", ()):
    if dep.startswith("//"):
      assert sees(target.package, LABELS[dep]), f"{dep} is hidden"


@pytest.mark.parametrize("name", [one for one in FLOORS if (ROOT / "distill" / one).is_dir()])
def test_build_packages_are_visible_only_to_packages_that_may_import_them(name):
  for other in (one for one in FLOORS if (ROOT / "distill" / one).is_dir() and one != name):
    if sees(f"distill/{other}", LABELS[f"//distill/{name}"]):
      assert FLOORS[other] > FLOORS[name] or FLOORS[other] == FLOORS[name] == 0, other


def test_build_targets_have_no_dependency_cycle():
  graphlib.TopologicalSorter({one.label: one.fields.get("deps", ()) for one in TARGETS}).prepare()


def test_imported_distributions_are_in_setup_py_and_the_lock_files():
  library, everything = requirements("install_requires"), requirements("install_requires|extras_require")
  for target in TARGETS:
    for dep in target.fields.get("deps", ()):
      if dep.startswith("@pypi//"):
        asked = library if target.package.startswith("distill") else everything
        assert dep.removeprefix("@pypi//") in asked, f"{target.label}: setup.py does not ask for {dep}"
  for lock in ROOT.glob("requirements-*.lock"):
    locked = {line.split("==")[0].replace("-", "_") for line in lock.read_text().split()}
    assert everything - {"test", "bench", "plan"} <= locked, lock
