"""`distill inspect` recognises the kind of a directory, and refuses directories of no known kind."""

import shutil

import pytest

from distill.errors import InputError
from distill.jobs.inspect import inspect


def test_inspect_distinguishes_models_from_adapters(llama_dir, adapter_dirs):
  assert "4 of attention" in "\n".join(inspect(llama_dir))
  assert "rank 4" in "\n".join(inspect(adapter_dirs[0]))


def test_adapters_in_subdirectories_are_listed_by_name(adapter_dirs, tmp_path):
  for name, path in zip(("chat", "tools"), adapter_dirs, strict=True):
    shutil.copytree(path, tmp_path / name)
  shown = "\n".join(inspect(tmp_path))
  assert "adapters: chat, tools" in shown and shown.count("adapter: LORA of rank 4") == 2


def test_inspect_refuses_an_empty_directory(tmp_path):
  with pytest.raises(InputError, match="is neither a model"):
    inspect(tmp_path)


def test_the_error_for_a_damaged_model_names_the_file(llama_dir, tmp_path):
  model = shutil.copytree(llama_dir, tmp_path / "model")
  path = model / "model.safetensors"
  path.write_bytes(path.read_bytes()[:50])
  with pytest.raises(InputError, match="model.safetensors: .*damaged"):
    list(inspect(model))


def test_inspect_refuses_its_argument_model_if_the_directory_is_not_an_adapter(llama_dir):
  with pytest.raises(InputError, match="model=base: "):
    inspect(llama_dir, model="base")
