import functools
import pathlib

import pytest

from tests.models.families import reference


@pytest.fixture(scope="session")
def built(tmp_path_factory):
  """built(family, case) -> (directory, transformers model), float32, made once."""

  @functools.cache
  def make(family: str, case: str) -> tuple[pathlib.Path, object]:
    directory = tmp_path_factory.mktemp(family)
    return directory, reference.build(family, case, directory=directory)

  return make
