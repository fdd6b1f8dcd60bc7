"""Models are found by their hub names in its cache on disk; no test goes online."""

import os
import shutil

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors

from distill.checkpoints import hf, hf_config, hub
from distill.data.tokenizer import load_tokenizer
from distill.errors import InputError

COMMIT = "c0ffee" * 6 + "c0ff"


@pytest.fixture
def cache(tmp_path, monkeypatch, llama_dir):
  """Offline, with the branch main of `lab/old` in the hub's cache, in the layout of the hub's client."""
  home = tmp_path / "hub" / "models--lab--old"
  snapshot = home / "snapshots" / COMMIT
  for directory in (home / "blobs", home / "refs", snapshot):
    directory.mkdir(parents=True)
  (home / "refs/main").write_text(COMMIT)
  for i, path in enumerate(sorted(llama_dir.iterdir())):
    shutil.copy(path, home / "blobs" / f"{i:064}")
    (snapshot / path.name).symlink_to(os.path.join("..", "..", "blobs", f"{i:064}"))
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
  return snapshot


@pytest.mark.parametrize("name", ["lab/old", "lab/old@main", f"lab/old@{COMMIT}"])
def test_a_cached_model_is_loaded_offline_through_links_to_blobs(cache, llama_dir, name):
  directory = hub.locate(name)
  assert directory == cache
  _, params = hf.load(directory)
  for key, value in hf.load(llama_dir)[1].items():
    np.testing.assert_array_equal(params[key], value)
  assert load_tokenizer(name)("old")["input_ids"] == load_tokenizer(llama_dir)("old")["input_ids"]


def test_a_link_out_of_the_hub_cache_is_refused(cache, tmp_path):
  shutil.copy(cache / "config.json", tmp_path / "real.json")
  (cache / "config.json").unlink()
  (cache / "config.json").symlink_to(tmp_path / "real.json")
  with pytest.raises(InputError, match="outside its directory"):
    hf.load(hub.locate("lab/old"))


def test_an_adapter_in_a_subfolder_of_a_repository_is_read(cache, adapter_dirs):
  from distill.adapters.peft import read_adapter

  (cache / "chat").mkdir()
  for i, path in enumerate(sorted(adapter_dirs[0].glob("adapter_*"))):
    shutil.copy(path, cache.parent.parent / "blobs" / f"a{i}")
    (cache / "chat" / path.name).symlink_to(os.path.join("..", "..", "..", "blobs", f"a{i}"))
  assert read_adapter(hub.locate("lab/old"), config=hf_config.read_config(cache)).edits


def test_a_model_that_is_not_cached_is_refused_offline(cache):
  for name in ("lab/new", "lab/old@v2"):
    with pytest.raises(InputError, match=f"{name}: no such directory, .* go online"):
      hub.locate(name)


def test_an_existing_directory_wins_over_a_hub_name_and_paths_are_not_looked_up_on_the_hub(tmp_path, monkeypatch):
  monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("looked up"))
  (tmp_path / "lab/old").mkdir(parents=True)
  monkeypatch.chdir(tmp_path)
  assert hub.locate("lab/old").resolve() == tmp_path / "lab/old"
  assert hub.locate("lab/old", relative_to=tmp_path) == tmp_path / "lab/old"
  for path in ("/lab/old", "./lab/new", "../lab/new", "new", "a/b/c", "lab/../new"):
    assert os.fspath(hub.locate(path)) == os.path.normpath(path) or ".." in path


def fails(monkeypatch, error):
  def download(*_, **__):
    raise error

  monkeypatch.setattr(hub, "snapshot_download", download)


class Response:
  """A stand-in for the response that errors of the hub's client carry."""

  headers: dict = {}
  request = None
  status_code = 404


@pytest.mark.parametrize(
  "kind, says",
  [
    (errors.GatedRepoError, "gated; ask for access"),
    (errors.RepositoryNotFoundError, "not found; correct the name"),
    (errors.RevisionNotFoundError, "no revision 'v9'"),
    (errors.LocalEntryNotFoundError, "go online"),
    (errors.HFValidationError, "not a valid hub name"),
    (ConnectionError, "cannot be reached"),
    (KeyError, "cannot be reached"),
  ],
)
def test_an_error_of_the_hub_becomes_one_line_with_advice(monkeypatch, kind, says):
  error = kind("no", response=Response()) if issubclass(kind, errors.HfHubHTTPError) else kind("no\nand no")
  fails(monkeypatch, error)
  with pytest.raises(InputError, match=says) as caught:
    hub.locate("lab/secret@v9")
  assert str(caught.value).startswith("lab/secret@v9: ") and "\n" not in str(caught.value)


def test_no_code_and_no_pickles_are_downloaded(monkeypatch, tmp_path):
  asked = {}

  def download(repo, *, revision, allow_patterns):
    asked.update(repo=repo, revision=revision, patterns=allow_patterns)
    return str(tmp_path)

  monkeypatch.setattr(hub, "snapshot_download", download)
  assert hub.locate("lab/old@v2") == tmp_path
  assert (asked["repo"], asked["revision"]) == ("lab/old", "v2")
  fetched = set(
    huggingface_hub.utils.filter_repo_objects(
      [
        "config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "chat/adapter_config.json",
        "chat/adapter_model.safetensors",
        "pytorch_model.bin",
        "modeling_x.py",
        "original/consolidated.00.pth",
        "consolidated.safetensors",
        "onnx/model.onnx",
        "training_args.bin",
        "optimizer.pt",
      ],
      allow_patterns=asked["patterns"],
    )
  )
  assert fetched == {
    "config.json",
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "chat/adapter_config.json",
    "chat/adapter_model.safetensors",
  }
