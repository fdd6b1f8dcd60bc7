"""Tokenizers from local directories."""

import os
import pathlib

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distill.errors import InputError


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
  """The tokenizer of a directory in the Hugging Face format.

  Raises:
    InputError: There is none, or it cannot be read.
  """
  if not (pathlib.Path(path) / "tokenizer_config.json").is_file():
    raise InputError(f"{path}/tokenizer_config.json: no such file; name a directory with a tokenizer")
  try:
    return AutoTokenizer.from_pretrained(path, local_files_only=True)
  except Exception as error:
    raise InputError(f"{path}: its tokenizer cannot be read ({str(error).splitlines()[0]})") from error
