"""Writes docs/config.md from the configuration's dataclasses; with --check only tests if the page is up to date.

python -m tools.config_docs [--check]
"""

import dataclasses
import itertools
import pathlib
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from distill.configuration import Description, describe
from distill.data.config import SOURCES, SourceConfig
from distill.jobs.config import RunConfig
from distill.schedules import SCHEDULES, ScheduleConfig

_PATH = pathlib.Path(__file__).resolve().parent.parent / "docs" / "config.md"
_HEAD = """# Every key of a recipe

`tools/config_docs.py` writes this page from the dataclasses that a recipe is read into. `NAME` is the name of a stage.
Any key may be overridden on the command line, as in `--config.training.batch_size=16` or
`--config.stages.distill.steps=50`; elements of other lists go by their place, as in `--config.data.sources.0.weight=2`.
"""
_WORDS = {int: "whole number", float: "number", bool: "True or False", str: "text", type(None): "None", Any: "any"}
# Dataclasses that a dict is read into by its kind.
_KINDS: dict[Any, str] = {SourceConfig: "source", ScheduleConfig: "schedule"}


def main() -> None:
  """Writes docs/config.md, or with --check exits with an error if the page is out of date."""
  if "--check" not in sys.argv[1:]:
    _PATH.write_text(page())
  elif not _PATH.exists() or _PATH.read_text() != page():
    sys.exit(f"{_PATH}: is not up to date with the dataclasses; run python -m tools.config_docs")


def page() -> str:
  """Returns the text of docs/config.md: a table for each section of a recipe and each kind of source and schedule."""
  rows = [row for row in describe(RunConfig) if not _is_section(row.hint)]
  rows.sort(key=lambda row: row.key.count(".") > 1)  # Keys of the run itself first; the sort keeps the rest in order.
  groups = itertools.groupby(rows, key=lambda row: row.key.rpartition(".")[0])
  tables = [_table(f"`{section}`", group) for section, group in groups]
  tables += [_table(f"A source of kind `{kind}`", describe(cls)) for kind, cls in SOURCES.items()]
  tables += [_table(f"A schedule of kind `{kind}`", describe(cls)) for kind, cls in SCHEDULES.items()]
  return "\n".join([_HEAD, *tables])


def _is_section(hint: Any) -> bool:
  """Returns True if an option is a section with its own options, which gets a separate table."""
  inner = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
  return dataclasses.is_dataclass(inner) and inner not in _KINDS


def _table(title: str, rows: Iterable[Description]) -> str:
  lines = [f"## {title}", "", "| key | value | default | meaning |", "|---|---|---|---|"]
  for row in rows:
    value = " or ".join(f"`{choice}`" for choice in row.choices) or _words(row.hint)
    cells = f"`{row.key.rpartition('.')[2]}`", value, _default(row.default), row.help
    lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
  return "\n".join([*lines, ""])


def _default(value: Any) -> str:
  return "required" if value is dataclasses.MISSING else f"`{value!r}`"


def _words(hint: Any) -> str:
  """Returns a type annotation in words, as in 'list of whole number'."""
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    return " or ".join(map(_words, arguments))
  if origin is tuple:
    if arguments[-1] is Ellipsis:
      return f"list of {_words(arguments[0])}"
    return f"({', '.join(map(_words, arguments))})"
  if hint in _KINDS:
    return _KINDS[hint]
  return _WORDS.get(hint, "dict" if isinstance(origin, type) and issubclass(origin, Mapping) else str(hint))


if __name__ == "__main__":
  main()
