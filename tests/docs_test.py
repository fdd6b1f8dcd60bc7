"""The documents name only files and functions that exist, and describe every loss term, optimizer, family and flag."""

import dataclasses
import importlib
import pathlib
import re
import textwrap

import numpy as np
import pytest

from distill.checkpoints.registry import FAMILIES
from distill.cli import configuration
from distill.cli.main import COMMANDS
from distill.jobs.config import resolve
from distill.objectives.terms import TERMS, read_terms
from distill.training.config import OptimizerConfig

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_in_the_documents_lead_to_files(page):
  links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
  missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
  assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_the_documents_name_exist(page):
  named = re.findall(r"\b(?:configs|docs|tools|tests|distill)/[\w./]+\.(?:py|sh|md)\b", page.read_text())
  assert not [name for name in named if not (ROOT / name).exists()]


def test_every_model_family_is_documented():
  rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "families.md").read_text(), re.MULTILINE)
  assert sorted(rows) == sorted([*FAMILIES, "model_type"])


def test_every_command_line_flag_is_documented():
  text = (ROOT / "docs" / "commands.md").read_text()
  for command in COMMANDS:
    flags = importlib.import_module(f"distill.cli.{command}").FLAGS
    missing = [name for name in flags if f"--{name}=" not in text]
    assert f"distill {command}" in text and not missing, command


def test_the_recipe_in_the_readme_is_valid():
  recipe = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
  names: dict = {}
  exec(recipe[1], names)
  assert [stage.name for stage in resolve(names["get_config"]()).stages] == ["align", "distill"]


def test_every_optimizer_is_documented():
  names = next(one for one in dataclasses.fields(OptimizerConfig) if one.name == "name").metadata["choices"]
  text = (ROOT / "docs" / "training.md").read_text()
  assert not [name for name in names if f"`{name}`" not in text]


def test_every_loss_term_is_documented_with_its_options():
  text = (ROOT / "docs" / "objectives.md").read_text()
  for name, term in TERMS.items():
    options = [field.name for field in dataclasses.fields(term)]
    assert not [word for word in (name, *options) if f"`{word}`" not in text], name


def test_the_example_term_in_the_documents_is_accepted(tmp_path, monkeypatch):
  page = (ROOT / "docs" / "objectives.md").read_text()
  module = re.search(r"```python\n(\s*# my_terms.py.*?)```", page, re.DOTALL)
  (tmp_path / "my_terms.py").write_text(textwrap.dedent(module[1]))
  monkeypatch.syspath_prepend(tmp_path)
  (term,) = read_terms([{"kind": "my_terms:Entropy", "weight": -0.01}], key="terms")
  entropy = term.token_loss(None, {}).per_token(np.zeros((1, 8), np.float32))
  np.testing.assert_allclose(entropy, np.log(8), rtol=1e-6)


def test_functions_that_the_design_document_names_exist():
  found = re.findall(r"`(distill/[\w/]+\.py)` `([\w.]+)`", (ROOT / "docs" / "design.md").read_text())
  assert len(found) > 20
  for path, names in found:
    defined = set(re.findall(r"(?:def|class) (\w+)", (ROOT / path).read_text()))
    assert set(names.split(".")) <= defined, f"{path}: {names}"


def test_the_design_page_leads_a_batch_through_at_most_25_files():
  section = (ROOT / "docs" / "design.md").read_text().split("## One batch through the code")[1].split("\n## ")[0]
  rows = re.findall(r"^\| (\d+)\. `([\w/]+\.py)` `", section, re.MULTILINE)
  assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
  assert 20 < len({path for _, path in rows}) == len(rows) <= 25
  assert f"the {len(rows)} files of the numbered rows" in section


def test_every_documentation_page_is_in_the_index():
  index = (ROOT / "README.md").read_text()
  assert not [page.name for page in ROOT.glob("docs/*.md") if f"(docs/{page.name})" not in index]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configuration_overrides_that_the_documents_show_are_accepted(page):
  shown = re.findall(r"--config\.([\w.]+)=([^\s`…\]]+)", page.read_text())
  overrides = {key: value for key, value in shown if key != "path.to.key"}
  configuration.load(str(ROOT / "configs" / "quickstart.py"), overrides=overrides)
