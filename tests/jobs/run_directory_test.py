"""A directory with checkpoints belongs to one configuration, and refuses runs of others."""

import json

import pytest

from distill.errors import InputError
from distill.jobs.config import resolve
from distill.jobs.run_directory import RunDirectory

RECIPE = {"data": {"sources": []}, "stages": [{"name": "only", "steps": 1, "terms": [{"kind": "cross_entropy"}]}]}


def test_the_same_run_can_claim_its_directory_again(tmp_path):
  directory = RunDirectory(tmp_path / "run")
  directory.claim(resolve(RECIPE))
  written = directory.config.read_text()
  directory.claim(resolve({**RECIPE, "training": {"checkpoint_every": 7}}))
  assert directory.config.read_text() == written
  assert json.loads(written)["config"]["stages"][0]["name"] == "only"


def test_a_directory_with_checkpoints_refuses_another_run_and_names_the_differing_key(tmp_path):
  directory, other = RunDirectory(tmp_path), resolve({**RECIPE, "seed": 1})
  directory.claim(resolve(RECIPE))
  directory.claim(other)
  (tmp_path / "checkpoints" / "4").mkdir(parents=True)
  assert directory.steps() == [4]
  with pytest.raises(InputError, match=r"config\.json: belongs to a run with another config\.seed"):
    directory.claim(resolve(RECIPE))


def test_a_model_directory_is_refused_as_a_workdir(tmp_path):
  (tmp_path / "config.json").write_text('{"model_type": "llama"}')
  with pytest.raises(InputError, match="belongs to a run with another config"):
    RunDirectory(tmp_path).claim(resolve(RECIPE))


def test_a_file_is_refused_as_a_workdir(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="cannot be written"):
    RunDirectory(tmp_path / "file").claim(resolve(RECIPE))
