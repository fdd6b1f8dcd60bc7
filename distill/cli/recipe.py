"""Defines and reads the flags of commands that run a recipe."""

import os
import pathlib
import stat
from collections.abc import Sequence

import jax
from absl import flags

from distill.cli import configuration
from distill.cli.parsing import parse
from distill.errors import InputError
from distill.jobs.config import RunConfig


def define(values: flags.FlagValues, *, workdir: str) -> None:
  """Adds the flags --config, --workdir (with `workdir` as its help text) and --compilation_cache."""
  config = "FILE.py or FILE.py:variant; --config.path.to.key=value overrides."
  flags.DEFINE_string("config", None, config, required=True, flag_values=values)
  flags.DEFINE_string("workdir", None, workdir, required=True, flag_values=values)
  flags.DEFINE_string(
    "compilation_cache",
    "",
    "Directory of compiled programs, for the next run; only you may write to it.",
    flag_values=values,
  )


def read(values: flags.FlagValues, arguments: Sequence[str]) -> tuple[RunConfig, pathlib.Path]:
  """Returns the configuration and the workdir of a command line, and turns the compilation cache on.

  Raises:
    InputError: A flag, the configuration or the compilation cache's directory is wrong.
  """
  rest, overrides = configuration.split(arguments)
  parse(values, rest)
  _use_compilation_cache(values.compilation_cache)
  return configuration.load(values.config, overrides=overrides), pathlib.Path(values.workdir)


def _use_compilation_cache(directory: str) -> None:
  """Turns on JAX's compilation cache in `directory`, which is created if missing; "" leaves it off.

  The programs in it are executed, so the directory must not be writable by others.
  """
  if not directory:
    return
  path = pathlib.Path(directory).absolute()
  try:
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = path.stat()
  except OSError as error:
    raise InputError(
      f"--compilation_cache={path}: cannot be created ({error.strerror}); name another directory"
    ) from error
  if not path.is_dir() or found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
    raise InputError(
      f"--compilation_cache={path}: other users could write programs there, which distill would execute; use a "
      "directory of your own, and run `chmod 700` on it"
    )
  jax.config.update("jax_compilation_cache_dir", str(path))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
