"""Writes files and directories so that they appear complete or not at all.

Each context manager yields a path to write to, inside a temporary directory next to the target. When its block ends
without an exception, it renames this path to the target. A crash leaves the target as it was.
"""

import contextlib
import fnmatch
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence

from distill.errors import InputError


@contextlib.contextmanager
def _temporary(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a path with the target's file name, in a temporary directory on the target's file system."""
  # The temporary directory is private, what is made inside it gets the permissions that the umask grants.
  with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent, ignore_cleanup_errors=True) as folder:
    yield pathlib.Path(folder) / target.name


@contextlib.contextmanager
def replace_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Context manager that yields a temporary path to write, and renames the file to `path` at the end.

  A file that exists at `path` is replaced.
  """
  with _temporary(path) as work:
    yield work
    os.replace(work, path)


@contextlib.contextmanager
def new_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Context manager that yields an empty temporary directory, and renames it to `path` at the end.

  Several processes may write the same content to the same path at once: the first to finish wins, and the others
  discard their directories.
  """
  with _temporary(path) as work:
    work.mkdir()
    yield work
    try:
      os.replace(work, path)
    except OSError:
      if not path.exists():
        raise


@contextlib.contextmanager
def replace_directory(path: pathlib.Path, *, marker: str, files: Sequence[str]) -> Iterator[pathlib.Path]:
  """Context manager that yields an empty temporary directory, which replaces the directory `path` at the end.

  Args:
    path: Absent, empty, or an earlier directory of the same kind, as `check_replaceable` tests.
    marker: Name of a file that every directory of this kind has.
    files: Glob patterns of all file names that a directory of this kind may have.

  Raises:
    InputError: `path` is not replaceable, or its parent cannot be written.
  """
  check_replaceable(path, marker=marker, files=files)
  target = pathlib.Path(os.path.abspath(path))
  with contextlib.ExitStack() as stack:
    try:
      target.parent.mkdir(parents=True, exist_ok=True)
      work = stack.enter_context(_temporary(target))
      work.mkdir()
    except OSError as error:
      raise InputError(f"{path}: cannot be written ({error.strerror}); name another directory") from error
    yield work
    if target.exists():
      os.replace(target, work.with_name(f"{work.name}.earlier"))
    os.replace(work, target)


def check_replaceable(path: pathlib.Path, *, marker: str, files: Sequence[str]) -> None:
  """Checks that a directory may be replaced: it is absent, empty, or an earlier one of the same kind.

  Args:
    path: The directory.
    marker: Name of a file that every directory of this kind has.
    files: Glob patterns of all file names that a directory of this kind may have.

  Raises:
    InputError: `path` is a file, holds files without the marker among them, or holds a file that no pattern matches, a
      link or a directory.
  """
  try:
    if path.exists() and not path.is_dir():
      raise InputError(f"{path}: is a file; name a directory to write to")
    entries = sorted(path.iterdir()) if path.is_dir() else []
    if entries and not (path / marker).exists():
      raise InputError(f"{path}: holds other files and no {marker}, so it is kept; name a new or empty directory")
    for entry in entries:
      known = any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in files)
      if not known or entry.is_symlink() or not entry.is_file():
        raise InputError(
          f"{path}: holds {entry.name}, which is no part of a model or an adapter; name a new or empty directory"
        )
  except OSError as error:
    raise InputError(f"{path}: cannot be written ({error.strerror}); name another directory") from error
