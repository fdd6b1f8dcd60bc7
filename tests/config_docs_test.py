"""docs/config.md documents the options that the configuration's dataclasses declare."""

import pathlib

from tools.config_docs import page

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "config.md"


def test_docs_config_md_is_up_to_date():
  assert PAGE.read_text() == page(), "run python -m tools.config_docs and commit docs/config.md"


def test_docs_config_md_has_tables_of_sections_stages_and_each_kind_of_source_and_schedule():
  headings = [line for line in page().splitlines() if line.startswith("## ")]
  assert headings[0] == "## `config`" and "## `config.stages.NAME.optimizer`" in headings
  assert "## A source of kind `jsonl`" in headings and "## A schedule of kind `cosine`" in headings
  assert "`adamw` or `muon`" in page() and "| `steps` | whole number | required |" in page()
