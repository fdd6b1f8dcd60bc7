"""The flag of commands that compile for long: a directory that keeps what XLA has compiled."""

import os
import pathlib
import stat

import jax
from absl import flags

from distill.errors import InputError


def define(values: flags.FlagValues) -> None:
  """Adds --compilation_cache."""
  flags.DEFINE_string(
    "compilation_cache", "", "Directory that keeps compiled programs for the next run; yours alone.", flag_values=values
  )


def start(values: flags.FlagValues) -> None:
  """Uses the directory that the flag names, made if it is not there.

  What lies in it is run: nobody else may write to it.

  Raises:
    InputError: Others may, or it cannot be made.
  """
  if not values.compilation_cache:
    return
  path = pathlib.Path(values.compilation_cache).absolute()
  try:
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = path.stat()
  except OSError as error:
    raise InputError(f"--compilation_cache={path}: cannot be made ({error.strerror}); name another") from error
  if not path.is_dir() or found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
    raise InputError(f"--compilation_cache={path}: others can write to it, and what is in it is run; `chmod 700` it")
  jax.config.update("jax_compilation_cache_dir", str(path))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
