"""Tokenizers from local directories and from the hub."""

import os

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distill.checkpoints.hf import TOKENIZER_FILES
from distill.checkpoints.hub import locate
from distill.errors import InputError
from distill.files.json_file import regular


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
  """Loads the tokenizer of a directory in the Hugging Face format.

  Raises:
    InputError: There is none, or it cannot be read.
  """
  path = locate(path)
  for name in TOKENIZER_FILES:
    if name == "tokenizer_config.json" or os.path.lexists(path / name):
      regular(path / name, hint="name a directory with a tokenizer")
  try:
    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
  except Exception as error:
    raise InputError(f"{path}: its tokenizer cannot be read ({str(error).splitlines()[0]})") from error
