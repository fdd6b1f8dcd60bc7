"""Token stores: text that is tokenised and packed once, with a fingerprint of everything that affects the rows."""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from distill.data.packing import loss_mask, pack, positions
from distill.data.sources import Document, DocumentSource
from distill.errors import InputError
from distill.files.replace import new_directory

VERSION = 5
# Options of a source that do not decide its content, which its digest covers.
PLACES = ("path", "data_files", "directory")
# `in_loss` tells whether predicting a token counts; `loss_mask` is its shift to the position that predicts.
_NAMES = ("tokens", "segments", "in_loss")
_SCANNED_ROWS = 1000
_GROUP_DOCUMENTS, _GROUP_CHARACTERS = 1000, 1 << 22


class TokenStore:
  """Rows of tokens of a fixed length, stored in a directory and read by memory-mapping.

  Attributes:
    rows: Number of rows.
    length: Number of tokens T in a row.
    fingerprint: Digest of everything that affects the rows.
    meta: Content of meta.json: the fingerprint, the numbers of rows, tokens and documents, the row length, the number
      of UTF-8 bytes of the text that counts in the loss, the source's options, and the digest of the tokenizer.

  Raises:
    InputError: The directory is not a complete token store.
  """

  def __init__(self, directory: str | os.PathLike[str]):
    self.directory = pathlib.Path(directory)
    try:
      self.meta: dict[str, Any] = json.loads((self.directory / "meta.json").read_text())
      self.rows, self.length = int(self.meta["rows"]), int(self.meta["length"])
      self.fingerprint = str(self.meta["fingerprint"])
      self._arrays = {name: np.load(self.directory / f"{name}.npy", mmap_mode="r") for name in _NAMES}
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
      reason = " ".join(str(error).split()) or type(error).__name__
      raise InputError(
        f"{directory}: the directory is not a complete token store ({reason}); delete it, and the next run rebuilds it"
      ) from error
    for name, array in self._arrays.items():
      kind = "b" if name == "in_loss" else "iu"
      if array.shape != (self.rows, self.length) or array.dtype.kind not in kind:
        raise InputError(
          f"{self.directory}/{name}.npy: the array does not have the shape and dtype that meta.json requires; delete "
          f"{self.directory}, and the next run rebuilds it"
        )

  def read(self, rows: Int[np.ndarray, " rows"]) -> dict[str, Any]:
    """Returns the arrays [rows,T] of the rows with the indices `rows`, in a dictionary.

    Its keys are tokens, segments and positions, int32, and loss_mask, float32.
    """
    tokens, segments, in_loss = (np.asarray(self._arrays[name][rows]) for name in _NAMES)
    segments = segments.astype(np.int32)
    return {
      "tokens": tokens.astype(np.int32),
      "segments": segments,
      "positions": positions(segments),
      "loss_mask": loss_mask(segments, in_loss=in_loss),
    }

  def teaches(self) -> bool:
    """Returns True if any row has a token that counts in the loss; stops reading after it has found one."""
    chunks = (np.arange(start, min(start + _SCANNED_ROWS, self.rows)) for start in range(0, self.rows, _SCANNED_ROWS))
    return any(bool(self.read(rows)["loss_mask"].any()) for rows in chunks)


def build_store(
  source: DocumentSource, *, tokenizer: PreTrainedTokenizerBase, length: int, directory: str | os.PathLike[str]
) -> TokenStore:
  """Returns the token store of a source; builds the store unless `directory` already has it.

  Args:
    source: Source of the documents.
    tokenizer: Turns the documents into tokens.
    length: Number of tokens T in a row.
    directory: Parent directory of token stores; each store is a subdirectory named by its fingerprint.

  Raises:
    InputError: The source has no documents, the tokenizer has no end-of-text token, `length` is below 2, or the store
      is damaged.
  """
  if length < 2:
    raise InputError(f"config.data.length: {length} is too short; use at least 2, one token to read and one to predict")
  if tokenizer.eos_token_id is None:
    raise InputError(
      "tokenizer: it has no end-of-text token to separate documents; set eos_token in the tokenizer's configuration"
    )
  fingerprint = _fingerprint(source, tokenizer=tokenizer, length=length)
  target = pathlib.Path(directory) / fingerprint[:16]
  if not target.exists():
    _write_store(target, source=source, tokenizer=tokenizer, length=length, fingerprint=fingerprint)
  store = TokenStore(target)
  if store.fingerprint != fingerprint:
    raise InputError(
      f"{target}/meta.json: the fingerprint is that of another token store; delete {target}, and the next run rebuilds "
      "it"
    )
  return store


def _write_store(
  target: pathlib.Path, *, source: DocumentSource, tokenizer: PreTrainedTokenizerBase, length: int, fingerprint: str
) -> None:
  target.parent.mkdir(parents=True, exist_ok=True)
  # Another process may build the same store at this moment, with the same rows.
  with new_directory(target) as work:
    meta = _write(work, source=source, tokenizer=tokenizer, length=length)
    if not meta["rows"]:
      raise InputError(
        f"data source {source.spec}: the source has no documents; give a source with at least one document"
      )
    (work / "meta.json").write_text(json.dumps({"fingerprint": fingerprint, **meta}, indent=1))


def _fingerprint(source: DocumentSource, *, tokenizer: PreTrainedTokenizerBase, length: int) -> str:
  spec = {key: value for key, value in source.spec.items() if key not in PLACES}
  parts = [VERSION, spec, source.digest, _digest(tokenizer), length]
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _digest(tokenizer: PreTrainedTokenizerBase) -> str:
  words = json.dumps([_tokenizer_settings(tokenizer), tokenizer.eos_token_id], sort_keys=True)
  return hashlib.sha256(words.encode()).hexdigest()


def _tokenizer_settings(tokenizer: PreTrainedTokenizerBase) -> Any:
  """Returns all settings of the tokenizer that affect which tokens a text becomes.

  Truncation and padding are left out, because every call of the tokenizer sets them.
  """
  backend = getattr(tokenizer, "backend_tokenizer", None)
  if backend is None:
    return tokenizer.get_vocab()
  return {key: value for key, value in json.loads(backend.to_str()).items() if key not in ("truncation", "padding")}


def _write(
  work: pathlib.Path, *, source: DocumentSource, tokenizer: PreTrainedTokenizerBase, length: int
) -> dict[str, Any]:
  counts = {"documents": 0, "tokens": 0, "bytes": 0}
  # Token ids may have gaps, so that their number is no bound.
  widest = max(tokenizer.get_vocab().values())
  dtypes = (np.min_scalar_type(widest), np.min_scalar_type(length), np.dtype(bool))
  rows = 0
  with contextlib.ExitStack() as stack:
    files = [stack.enter_context(open(work / f"{name}.npy", "wb")) for name in _NAMES]
    for file, dtype in zip(files, dtypes, strict=True):
      _header(file, dtype=dtype, shape=(0, length))
    for row in pack(_encode(source.documents(), tokenizer, counts), length=length):
      for file, dtype, part in zip(files, dtypes, row, strict=True):
        file.write(part.astype(dtype).tobytes())
      rows += 1
    for file, dtype in zip(files, dtypes, strict=True):
      file.seek(0)
      _header(file, dtype=dtype, shape=(rows, length))
  return {"rows": rows, "length": length, **counts, "source": dict(source.spec), "tokenizer": _digest(tokenizer)}


def _header(file: BinaryIO, *, dtype: np.dtype, shape: tuple[int, int]) -> None:
  """Writes the header of a .npy file.

  The header can be overwritten later with another number of rows: NumPy reserves space for it, so its size is the same.
  """
  fields = {"shape": shape, "fortran_order": False, "descr": dtype.str}
  np.lib.format.write_array_header_1_0(file, fields)


def _encode(
  documents: Iterator[Document], tokenizer: PreTrainedTokenizerBase, counts: dict[str, int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields (token ids, loss mask) for each document; the mask is False for the tokens of its prompt.

  The ids end with the end-of-text token; no start token is added. Each document is added to the totals in `counts`:
  numbers of documents, of tokens, and of UTF-8 bytes without the prompt.
  """
  for group in _groups(documents):
    prompts = tokenizer([one.prompt for one in group], add_special_tokens=False, verbose=False)["input_ids"]
    texts = tokenizer([one.text for one in group], add_special_tokens=False, verbose=False)["input_ids"]
    for document, prompt, text in zip(group, prompts, texts, strict=True):
      ids = np.asarray([*prompt, *text, tokenizer.eos_token_id], np.int32)
      counts["documents"] += 1
      counts["tokens"] += len(ids)
      counts["bytes"] += len(document.text.encode())
      yield ids, np.arange(len(ids)) >= len(prompt)


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
  """Yields lists of consecutive documents that are small enough to be tokenised at once."""
  group: list[Document] = []
  size = 0
  for document in documents:
    group.append(document)
    size += len(document.prompt) + len(document.text)
    if len(group) >= _GROUP_DOCUMENTS or size >= _GROUP_CHARACTERS:
      yield group
      group, size = [], 0
  if group:
    yield group
