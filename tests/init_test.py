"""`import distill` offers every command as a function, and does not import jax."""

import inspect
import subprocess
import sys

import pytest

import distill
from distill.cli.main import COMMANDS


def test_import_distill_does_not_import_jax():
  check = "import distill, sys; sys.exit(bool({'jax', 'numpy', 'transformers', 'tensorflow'} & set(sys.modules)))"
  subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize("name", sorted({*COMMANDS, "merge_adapters", "cache_teacher"} - {"cache"}))
def test_every_command_is_a_documented_function_of_distill(name):
  text = inspect.getdoc(getattr(distill, name))
  assert text and "Args:" in text and "Raises:" in text


def test_every_name_that_dir_of_distill_lists_exists():
  assert all(getattr(distill, name) for name in dir(distill))


def test_an_unknown_attribute_of_distill_raises_attribute_error():
  with pytest.raises(AttributeError, match="no attribute 'destill'"):
    distill.destill  # noqa: B018
