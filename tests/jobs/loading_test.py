"""Adapters are given as a list of directories or as the JSON file of a stack."""

import json

import pytest

from distill.errors import InputError
from distill.jobs.loading import adapter_stack, load_model


def test_an_adapter_stack_is_a_list_of_directories_or_a_json_file(adapter_dirs, tmp_path):
  listed = adapter_stack(adapter_dirs)
  path = tmp_path / "stack.json"
  path.write_text(json.dumps({"adapters": [{"path": str(one)} for one in adapter_dirs]}))
  assert adapter_stack(path) == adapter_stack(str(path)) == listed
  assert [entry.path for entry in listed] == adapter_dirs


@pytest.mark.parametrize(
  "text, match",
  [
    ("[", "JSON"),
    ("{}", "adapters"),
    ('{"adapters": [{"weight": 1}]}', r"adapters\[0\].path"),
    ('{"adapters": [{"path": "x", "wait": 1}]}', r"adapters\[0\].wait"),
    ('{"adapters": [{"path": "x", "weight": "1"}]}', r"adapters\[0\].weight"),
    ('{"adapters": [{"path": "x", "mode": "parallel"}]}', r"adapters\[0\].mode.*sequential"),
  ],
)
def test_the_error_for_a_malformed_or_missing_stack_file_names_the_file(tmp_path, text, match):
  (tmp_path / "stack.json").write_text(text)
  with pytest.raises(InputError, match=f"stack.json.*{match}"):
    adapter_stack(tmp_path / "stack.json")
  with pytest.raises(InputError, match="gone.json: no such file"):
    adapter_stack(tmp_path / "gone.json")


def test_the_error_for_a_missing_adapter_names_the_missing_file(llama_dir, tmp_path):
  with pytest.raises(InputError, match="gone/adapter_config.json"):
    load_model(llama_dir, stack=adapter_stack([tmp_path / "gone"]))
