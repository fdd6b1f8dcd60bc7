"""An export is the model bit by bit, and never writes over anything else."""

import shutil

import pytest

from distill.errors import InputError
from distill.jobs.export import export, finished_student


def test_an_export_is_bit_equal(llama_dir, tmp_path):
  export(llama_dir, out=tmp_path / "copy")
  for name in ("model.safetensors", "config.json", "tokenizer.json"):
    assert (tmp_path / "copy" / name).read_bytes() == (llama_dir / name).read_bytes()


def test_a_directory_with_other_files_is_not_replaced(llama_dir, tmp_path):
  (tmp_path / "letter.txt").write_text("dear")
  with pytest.raises(InputError, match="holds other files"):
    export(llama_dir, out=tmp_path)
  with pytest.raises(InputError, match="letter.txt: is a file"):
    export(llama_dir, out=tmp_path / "letter.txt")
  assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_directory_that_cannot_be_made_is_named(llama_dir):
  with pytest.raises(InputError, match="/proc/nowhere: cannot be written"):
    export(llama_dir, out="/proc/nowhere")


def test_a_model_is_not_written_over_itself(llama_dir, tmp_path):
  model = shutil.copytree(llama_dir, tmp_path / "model")
  with pytest.raises(InputError, match="name another"):
    export(model, out=model)


def test_a_run_without_a_student_has_not_finished(tmp_path):
  with pytest.raises(InputError, match="student: no such directory; finish the run"):
    finished_student(tmp_path)
