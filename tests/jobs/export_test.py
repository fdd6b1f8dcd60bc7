"""An exported model is bit-equal to the original, and never replaces files of another kind."""

import shutil

import pytest

from distill.errors import InputError
from distill.jobs.export import export, finished_student


def test_an_exported_model_is_bit_equal_to_the_original(llama_dir, tmp_path):
  export(llama_dir, out=tmp_path / "copy")
  for name in ("model.safetensors", "config.json", "tokenizer.json"):
    assert (tmp_path / "copy" / name).read_bytes() == (llama_dir / name).read_bytes()


def test_export_refuses_to_replace_a_directory_that_holds_other_files(llama_dir, tmp_path):
  (tmp_path / "letter.txt").write_text("dear")
  with pytest.raises(InputError, match="holds other files"):
    export(llama_dir, out=tmp_path)
  with pytest.raises(InputError, match="letter.txt: is a file"):
    export(llama_dir, out=tmp_path / "letter.txt")
  assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_the_error_for_an_output_directory_that_cannot_be_created_names_it(llama_dir):
  with pytest.raises(InputError, match="/proc/nowhere: cannot be written"):
    export(llama_dir, out="/proc/nowhere")


def test_exporting_a_model_over_itself_is_refused(llama_dir, tmp_path):
  model = shutil.copytree(llama_dir, tmp_path / "model")
  with pytest.raises(InputError, match="name another"):
    export(model, out=model)


def test_a_run_directory_without_a_student_is_refused_as_unfinished(tmp_path):
  with pytest.raises(InputError, match="student: no such directory, because the run has not finished"):
    finished_student(tmp_path)
