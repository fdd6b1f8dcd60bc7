"""Files and directories are written whole or not at all."""

import pathlib

import pytest

from distill.errors import InputError
from distill.files.replace import check_replaceable, new_directory, replace_directory, replace_file

MODEL = {"marker": "config.json", "files": ("config.json", "*.safetensors")}


def names(directory: pathlib.Path) -> list[str]:
  return sorted(path.name for path in directory.iterdir())


def test_replace_file_replaces_the_earlier_file(tmp_path):
  (tmp_path / "a.txt").write_text("old")
  with replace_file(tmp_path / "a.txt") as work:
    work.write_text("new")
    assert (tmp_path / "a.txt").read_text() == "old"
  assert (tmp_path / "a.txt").read_text() == "new" and names(tmp_path) == ["a.txt"]


def test_a_failed_replace_file_leaves_the_earlier_file_and_nothing_else(tmp_path):
  (tmp_path / "a.txt").write_text("old")
  with pytest.raises(RuntimeError), replace_file(tmp_path / "a.txt") as work:
    work.write_text("half")
    raise RuntimeError
  assert (tmp_path / "a.txt").read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_new_directory_keeps_what_a_faster_process_wrote(tmp_path):
  with new_directory(tmp_path / "store") as work:
    (work / "rows").write_text("mine")
    (tmp_path / "store").mkdir()
    (tmp_path / "store/rows").write_text("theirs")
  assert (tmp_path / "store/rows").read_text() == "theirs" and names(tmp_path) == ["store"]


def test_new_directory_leaves_nothing_if_writing_it_fails(tmp_path):
  with pytest.raises(RuntimeError), new_directory(tmp_path / "store") as work:
    (work / "rows").write_text("half")
    raise RuntimeError
  assert names(tmp_path) == []


def test_replace_directory_leaves_no_file_of_the_earlier_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for file in ("model-1.safetensors", "model.safetensors"):
    with replace_directory(pathlib.Path("parents/model"), **MODEL) as work:
      (work / "config.json").write_text("{}")
      (work / file).write_text("")
  assert names(tmp_path / "parents/model") == ["config.json", "model.safetensors"]
  assert names(tmp_path / "parents") == ["model"]


def test_replace_directory_leaves_the_earlier_directory_if_writing_the_new_one_fails(tmp_path):
  (tmp_path / "config.json").write_text("old")
  with pytest.raises(RuntimeError), replace_directory(tmp_path, **MODEL) as work:
    (work / "config.json").write_text("half")
    raise RuntimeError
  assert (tmp_path / "config.json").read_text() == "old" and names(tmp_path) == ["config.json"]


def test_replaced_files_and_directories_have_ordinary_permissions(tmp_path):
  with replace_directory(tmp_path / "model", **MODEL) as work:
    (work / "config.json").write_text("{}")
  (tmp_path / "ordinary").mkdir()
  (tmp_path / "ordinary/file").write_text("")
  for path, other in (("model", "ordinary"), ("model/config.json", "ordinary/file")):
    assert (tmp_path / path).stat().st_mode == (tmp_path / other).stat().st_mode


@pytest.mark.parametrize(
  "held, says",
  [
    (["thesis.txt"], "holds other files and no config.json"),
    (["config.json", "thesis.txt"], "holds thesis.txt, which is no part of a model or an adapter"),
    (["config.json", "a.safetensors/x"], "holds a.safetensors, which is no part of a model or an adapter"),
  ],
)
def test_check_replaceable_refuses_a_directory_that_holds_other_files(tmp_path, held, says):
  for name in held:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
  with pytest.raises(InputError, match=says):
    check_replaceable(tmp_path, **MODEL)


def test_check_replaceable_refuses_a_file_and_a_directory_that_holds_a_link(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="file: is a file; name a directory"):
    check_replaceable(tmp_path / "file", **MODEL)
  (tmp_path / "model").mkdir()
  (tmp_path / "model/config.json").symlink_to(tmp_path / "file")
  with pytest.raises(InputError, match=r"holds config\.json"):
    check_replaceable(tmp_path / "model", **MODEL)


def test_replacing_a_directory_whose_parent_is_a_file_raises_an_input_error(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="cannot be written"), replace_directory(tmp_path / "file/model", **MODEL):
    pytest.fail("written")
