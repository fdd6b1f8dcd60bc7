"""Finds the directory of a model: a path, or a repository of the Hugging Face hub, which is downloaded once."""

import os
import pathlib
import re

from huggingface_hub import errors, snapshot_download

from distill.checkpoints import hf
from distill.errors import InputError
from distill.parallel.processes import fail_together

_NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w.-][\w./-]*))?", re.ASCII)
# No code, no pickles, and no second copy of the weights in another format.
_FILES = (
  "config.json",
  "model.safetensors",
  "model-*.safetensors",
  "model.safetensors.index.json",
  "adapter_config.json",
  "adapter_model*.safetensors*",
  "*/adapter_config.json",
  "*/adapter_model*.safetensors*",
  *hf.COMPANIONS,
)


def locate(name: str | os.PathLike[str], *, relative_to: pathlib.Path = pathlib.Path()) -> pathlib.Path:
  """Returns the directory of a model or adapter, and downloads it if needed.

  Args:
    name: A path, `org/name` or `org/name@revision`. An existing directory wins over a repository of the same name.
    relative_to: The directory that relative paths start from.

  Returns:
    The directory. It may not exist if `name` is not a valid hub name.

  Raises:
    InputError: The repository or revision does not exist, is not accessible, or is neither cached nor reachable.
  """
  # A path may exist on one host and be missing on another, so every process enters the collective in any case.
  with fail_together(os.fspath(name)):
    path = relative_to / name
    found = _NAME.fullmatch(os.fspath(name))
    if found is None or os.path.lexists(path) or ".." in os.fspath(name):
      return path
    return _download(os.fspath(name), repo=found["repo"], revision=found["revision"])


def _download(name: str, *, repo: str, revision: str | None) -> pathlib.Path:
  repository = f"{name}: no such directory, and the hub's repository"
  try:
    return pathlib.Path(snapshot_download(repo, revision=revision, allow_patterns=list(_FILES)))
  except errors.GatedRepoError as error:
    raise InputError(f"{repository} is gated; ask for access on its page, then run `hf auth login`") from error
  except errors.RepositoryNotFoundError as error:
    raise InputError(
      f"{repository} was not found; correct the name, or run `hf auth login` if it is private"
    ) from error
  except errors.RevisionNotFoundError as error:
    raise InputError(f"{repository} has no revision {revision!r}; name a branch, a tag or a commit") from error
  except errors.LocalEntryNotFoundError as error:
    raise InputError(f"{repository} is neither cached nor reachable; go online, or give a directory") from error
  except errors.HFValidationError as error:
    raise InputError(f"{repository} is not a valid hub name; write org/name or org/name@revision") from error
  except Exception as error:  # Network and file-system errors have many types.
    failure = type(error).__name__
    raise InputError(f"{repository} cannot be reached ({failure}); go online, or give a directory") from error
