"""Token stores: text tokenised and packed once, with a fingerprint of everything that decides the rows."""

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
  """Fixed-length rows of tokens in a directory.

  Attributes:
    rows: Number of rows.
    length: Tokens a row, T.
    fingerprint: Digest of everything that decides the rows.
    meta: Content of meta.json: fingerprint, rows, length, tokens, documents, bytes (UTF-8, of text in the loss),
      source, and the digest of the tokenizer.
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
      raise InputError(f"{directory}: not a complete token store ({reason}); delete it to rebuild it") from error
    for name, array in self._arrays.items():
      kind = "b" if name == "in_loss" else "iu"
      if array.shape != (self.rows, self.length) or array.dtype.kind not in kind:
        raise InputError(f"{self.directory}/{name}.npy: does not agree with meta.json; delete the store to rebuild it")

  def read(self, rows: Int[np.ndarray, " rows"]) -> dict[str, Any]:
    """Returns tokens, segments, positions (int32) and loss_mask (float32) [rows,T] of these rows."""
    tokens, segments, in_loss = (np.asarray(self._arrays[name][rows]) for name in _NAMES)
    segments = segments.astype(np.int32)
    return {
      "tokens": tokens.astype(np.int32),
      "segments": segments,
      "positions": positions(segments),
      "loss_mask": loss_mask(segments, in_loss=in_loss),
    }

  def teaches(self) -> bool:
    """Returns True if any row has a token that counts in the loss; reads rows up to the first such one."""
    chunks = (np.arange(start, min(start + _SCANNED_ROWS, self.rows)) for start in range(0, self.rows, _SCANNED_ROWS))
    return any(bool(self.read(rows)["loss_mask"].any()) for rows in chunks)


def build(
  source: DocumentSource, *, tokenizer: PreTrainedTokenizerBase, length: int, directory: str | os.PathLike[str]
) -> TokenStore:
  """Returns the token store of a source; builds it unless `directory` already holds it.

  Args:
    source: The documents.
    tokenizer: Tokenizer of the rows.
    length: Tokens a row, T.
    directory: Directory of stores, each in a directory named by its fingerprint.

  Raises:
    InputError: The source has no documents, the tokenizer no end-of-text token, the rows are too short, or the store
      is damaged.
  """
  if length < 2:
    raise InputError(f"config.data.length: {length}; a row needs at least 2 tokens, one to read and one to predict")
  if tokenizer.eos_token_id is None:
    raise InputError("tokenizer: no end-of-text token, which separates documents; set eos_token")
  fingerprint = _fingerprint(source, tokenizer=tokenizer, length=length)
  target = pathlib.Path(directory) / fingerprint[:16]
  if not target.exists():
    _build(target, source=source, tokenizer=tokenizer, length=length, fingerprint=fingerprint)
  store = TokenStore(target)
  if store.fingerprint != fingerprint:
    raise InputError(f"{target}/meta.json: has the fingerprint of another store; delete the directory to rebuild it")
  return store


def _build(
  target: pathlib.Path, *, source: DocumentSource, tokenizer: PreTrainedTokenizerBase, length: int, fingerprint: str
) -> None:
  target.parent.mkdir(parents=True, exist_ok=True)
  # Another process may build the same store at this moment, with the same rows.
  with new_directory(target) as work:
    meta = _write(work, source=source, tokenizer=tokenizer, length=length)
    if not meta["rows"]:
      raise InputError(f"{source.spec}: it has no documents; give another source")
    (work / "meta.json").write_text(json.dumps({"fingerprint": fingerprint, **meta}, indent=1))


def _fingerprint(source: DocumentSource, *, tokenizer: PreTrainedTokenizerBase, length: int) -> str:
  spec = {key: value for key, value in source.spec.items() if key not in PLACES}
  parts = [VERSION, spec, source.digest, _digest(tokenizer), length]
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _digest(tokenizer: PreTrainedTokenizerBase) -> str:
  words = json.dumps([_words(tokenizer), tokenizer.eos_token_id], sort_keys=True)
  return hashlib.sha256(words.encode()).hexdigest()


def _words(tokenizer: PreTrainedTokenizerBase) -> Any:
  """Returns all settings that affect how text becomes tokens, without truncation and padding, which each call sets."""
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
  """Writes the header of a .npy file; NumPy reserves space for more rows, so that a later header has the same size."""
  fields = {"shape": shape, "fortran_order": False, "descr": dtype.str}
  np.lib.format.write_array_header_1_0(file, fields)


def _encode(
  documents: Iterator[Document], tokenizer: PreTrainedTokenizerBase, counts: dict[str, int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields (tokens, in_loss) of each document, with an end-of-text token and without a start token."""
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
  """Yields groups of documents that fit into memory."""
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
