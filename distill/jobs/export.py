"""The export job: writes a model as a Hugging Face directory."""

import pathlib

from distill.checkpoints import hf
from distill.checkpoints.hub import locate
from distill.errors import InputError
from distill.jobs.loading import Path
from distill.jobs.run_directory import RunDirectory


def export(model: Path, *, out: Path) -> None:
  """Checks a model and copies it bit by bit to a new Hugging Face directory, atomically.

  Args:
    model: Directory, for example the `student` of a run, or org/name[@revision] of the hub.
    out: Directory to write: absent, empty, or holding a model, which is replaced.

  Raises:
    InputError: The model is missing or damaged, or `out` cannot be written or is the model's own directory.
  """
  source, out = locate(model), pathlib.Path(out)
  if out.resolve() == source.resolve():
    raise InputError(f"out={out}: is the directory of the model itself; name another directory")
  config, params = hf.load(source)
  hf.save(out, config=config, params=params, tokenizer_from=source, config_from=source)


def finished_student(workdir: Path) -> pathlib.Path:
  """Returns the directory of the student that a finished run wrote.

  Raises:
    InputError: The run has not finished.
  """
  student = RunDirectory(pathlib.Path(workdir)).student
  if not student.is_dir():
    raise InputError(
      f"{student}: no such directory, because the run has not finished; repeat its distill train command"
    )
  return student
