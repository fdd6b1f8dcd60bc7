"""Names to directories: a directory as it is, or a repository of the hub, downloaded once and kept in its cache."""

import os
import pathlib
import re

from huggingface_hub import errors, snapshot_download

from distill.checkpoints import hf
from distill.errors import InputError
from distill.parallel.processes import fail_together

_NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w.-][\w./-]*))?", re.ASCII)
# Nothing that would have to be run to be read, and no second copy of the weights in another format.
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
  """The directory that `name` means: a path, or `org/name` or `org/name@revision` of the hub.

  Args:
    name: A directory that exists goes before a repository of the same name.
    relative_to: The directory that relative paths start from.

  Returns:
    The directory, which may not exist if the name cannot be one of the hub.

  Raises:
    InputError: No such repository or revision, access that is not granted, or no network and nothing in the cache.
  """
  # What is a path on one host may be missing on another: all meet, whatever each of them finds.
  with fail_together(os.fspath(name)):
    path = relative_to / name
    found = _NAME.fullmatch(os.fspath(name))
    if found is None or os.path.lexists(path) or ".." in os.fspath(name):
      return path
    return _download(os.fspath(name), repo=found["repo"], revision=found["revision"])


def _download(name: str, *, repo: str, revision: str | None) -> pathlib.Path:
  start = f"{name}: no such directory, and as a repository of the hub"
  try:
    return pathlib.Path(snapshot_download(repo, revision=revision, allow_patterns=list(_FILES)))
  except errors.GatedRepoError as error:
    raise InputError(f"{start} it is gated; ask for access on its page, then `hf auth login`") from error
  except errors.RepositoryNotFoundError as error:
    raise InputError(f"{start} not found; correct the name, or `hf auth login` if it is private") from error
  except errors.RevisionNotFoundError as error:
    raise InputError(f"{start} it has no revision {revision!r}; name a branch, a tag or a commit") from error
  except errors.LocalEntryNotFoundError as error:
    raise InputError(f"{start} it is not in the cache and cannot be fetched; go online, or give a directory") from error
  except errors.HFValidationError as error:
    raise InputError(f"{start} not a legal name; write org/name or org/name@revision") from error
  except Exception as error:  # Of the network and of the cache there are many kinds.
    raise InputError(f"{start} not to be reached ({type(error).__name__}); go online, or give a directory") from error
