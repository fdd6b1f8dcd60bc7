"""Untrusted JSON is read, or refused in one line that names the file and the key."""

import os

import pytest

from distill.errors import InputError
from distill.files.json_file import flag, integer, number, parse, read_json, regular


@pytest.mark.parametrize(
  ("text", "says"),
  [
    (b'{"a": 1, "a": 2}', "here: the key 'a' appears twice"),
    (b'{"a": {"b": 1, "b": 1}}', "here: the key 'b' appears twice"),
    (b'{"a": NaN}', "here: holds NaN, which is not JSON; write a number"),
    (b'{"a": Infinity}', "here: holds Infinity"),
    (b'{"time_step_limit": -Infinity}', "here: holds -Infinity"),
    (b'{"time_step_limit": Infinity}', "here: holds Infinity"),
    (b'{"a": 1,\n "b" 2}', "here: cannot be read as JSON .* correct it at line 2, column 6"),
    (b"[1]", "here: expected a JSON object"),
    (b'{"a": ' + b"[" * 60 + b"]" * 60 + b"}", "here: cannot be read as JSON .nested too deeply"),
    (b'{"a": ' + b"[" * 100_000, "here: cannot be read as JSON .nested too deeply"),
    (b'{"a": "\xff"}', "here: cannot be read as JSON"),
    (b'{"a": ' + b"9" * 5000 + b"}", "here: cannot be read as JSON"),
  ],
)
def test_invalid_json_is_refused(text, says):
  with pytest.raises(InputError, match=f"^{says}") as caught:
    parse(text, where="here")
  assert "\n" not in str(caught.value)


def test_infinity_is_read_inside_a_time_step_limit_list():
  assert parse(b'{"time_step_limit": [0.0, Infinity]}', where="here") == {"time_step_limit": [0.0, float("inf")]}


@pytest.mark.parametrize("value", [True, "1", 1.5, 0, 6, float("nan"), None, 10**400])
def test_other_types_and_values_out_of_range_are_refused_where_an_integer_is_expected(value):
  with pytest.raises(InputError, match="^file: key = .*: expected a whole number from 1 to 5$"):
    integer(value, where="file: key", high=5)


def test_a_whole_float_is_read_where_an_integer_is_expected():
  assert integer(4.0, where="file: key", high=5) == 4


@pytest.mark.parametrize("value", [False, "1", float("inf"), -0.1, 10**400, [1] * 100])
def test_other_types_and_values_out_of_range_are_refused_where_a_number_is_expected(value):
  with pytest.raises(InputError, match="^file: key = .*: expected a finite number from 0 to 1$"):
    number(value, where="file: key", low=0, high=1)


def test_a_number_is_refused_where_true_or_false_is_expected():
  assert flag(True, where="file: key") is True
  with pytest.raises(InputError, match="^file: key = 1: expected true or false$"):
    flag(1, where="file: key")


def test_missing_files_pipes_and_links_out_of_the_directory_are_refused(tmp_path):
  (tmp_path / "home").mkdir()
  (tmp_path / "a.json").write_text('{"a": 1}')
  (tmp_path / "home/link.json").symlink_to(tmp_path / "a.json")
  os.mkfifo(tmp_path / "home/pipe.json")
  assert read_json(tmp_path / "a.json") == {"a": 1} and regular(tmp_path / "a.json", hint="") == 8
  for name, says in (
    ("link.json", "outside its directory"),
    ("pipe.json", "is not a plain file"),
    ("x", "no such file"),
  ):
    with pytest.raises(InputError, match=f"{name}: .*{says}"):
      read_json(tmp_path / "home" / name)


def test_a_link_from_a_snapshot_to_a_blob_of_the_hub_cache_is_read(tmp_path):
  (tmp_path / "blobs").mkdir()
  (tmp_path / "blobs/0").write_text("{}")
  (tmp_path / "snapshots/main").mkdir(parents=True)
  (tmp_path / "snapshots/main/config.json").symlink_to(tmp_path / "blobs/0")
  assert read_json(tmp_path / "snapshots/main/config.json") == {}


def test_a_huge_json_file_is_refused_without_being_read(tmp_path):
  with (tmp_path / "a.json").open("wb") as file:
    file.truncate(2**30)
  with pytest.raises(InputError, match="a JSON file may have"):
    read_json(tmp_path / "a.json")
