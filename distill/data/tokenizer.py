"""Loads tokenizers from local directories and from the Hugging Face hub."""

import os

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distill.checkpoints.hf import TOKENIZER_FILES
from distill.checkpoints.hub import locate
from distill.errors import InputError
from distill.files.json_file import regular


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
  """Loads the tokenizer of a directory in the Hugging Face format, or of a model on the hub.

  Raises:
    InputError: The directory has no tokenizer, or the tokenizer cannot be read.
  """
  path = locate(path)
  for name in TOKENIZER_FILES:
    if name == "tokenizer_config.json" or os.path.lexists(path / name):
      regular(path / name, hint="name a directory with a tokenizer")
  try:
    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
  except Exception as error:
    reason = str(error).splitlines()[0]
    raise InputError(
      f"{path}: the tokenizer in this directory cannot be read ({reason}); name a directory with a tokenizer that "
      "transformers can load"
    ) from error
