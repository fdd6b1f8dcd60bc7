"""Token stores: text tokenised and packed once, with a fingerprint of all that went in."""

import hashlib
import itertools
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.data.packing import loss_mask, pack, positions
from distill.data.sources import Document, Source
from distill.errors import InputError

VERSION = 1
_FILES = {"tokens": np.int32, "segments": np.int32, "learnt": np.bool_}


class TokenStore:
  """Fixed-length rows of tokens in a directory.

  Attributes:
    rows: Number of rows.
    length: Tokens a row, T.
    meta: fingerprint, rows, length, tokens, documents, bytes (UTF-8, of the text that is learnt) and source.
  """

  def __init__(self, directory: str | os.PathLike[str]):
    self.directory = pathlib.Path(directory)
    try:
      self.meta: dict[str, Any] = json.loads((self.directory / "meta.json").read_text())
      self.rows, self.length = int(self.meta["rows"]), int(self.meta["length"])
      self._arrays = {name: np.load(self.directory / f"{name}.npy", mmap_mode="r") for name in _FILES}
    except (OSError, ValueError, KeyError) as error:
      raise InputError(f"{directory}: not a whole token store ({error}); delete it and it is built again") from error
    for name, dtype in _FILES.items():
      array = self._arrays[name]
      if array.shape != (self.rows, self.length) or array.dtype != dtype:
        raise InputError(f"{self.directory}/{name}.npy: does not agree with meta.json; delete the store to rebuild it")

  def read(self, rows: np.ndarray) -> dict[str, Any]:
    """tokens, segments, positions (int32) and loss_mask (float32) [n,T] of the rows asked for."""
    tokens, segments, learnt = (np.asarray(self._arrays[name][rows]) for name in _FILES)
    return {
      "tokens": tokens,
      "segments": segments,
      "positions": positions(segments),
      "loss_mask": loss_mask(segments, learnt=learnt),
    }


def build(
  source: Source, *, tokenizer: PreTrainedTokenizerBase, length: int, directory: str | os.PathLike[str]
) -> TokenStore:
  """The store of `source` under `directory`, named by its fingerprint; written only if it is not there.

  Raises:
    InputError: A source without documents, or a tokenizer without an end-of-text token.
  """
  fingerprint = _fingerprint(source, tokenizer=tokenizer, length=length)
  target = pathlib.Path(directory) / fingerprint[:16]
  if target.exists():
    store = TokenStore(target)
    if store.meta["fingerprint"] != fingerprint:
      raise InputError(f"{target}/meta.json: fingerprint of another store; delete the directory to rebuild it")
    return store
  if tokenizer.eos_token_id is None:
    raise InputError("tokenizer: no end-of-text token (eos_token); documents cannot be told apart")
  target.parent.mkdir(parents=True, exist_ok=True)
  work = pathlib.Path(tempfile.mkdtemp(prefix=".building-", dir=target.parent))
  try:
    meta = _write(work, source=source, tokenizer=tokenizer, length=length)
    if not meta["rows"]:
      raise InputError(f"{source.spec}: no documents in it")
    (work / "meta.json").write_text(json.dumps({"fingerprint": fingerprint, **meta}, indent=1, default=str))
    os.chmod(work, 0o755)
    os.replace(work, target)
  finally:
    shutil.rmtree(work, ignore_errors=True)
  return TokenStore(target)


def _fingerprint(source: Source, *, tokenizer: PreTrainedTokenizerBase, length: int) -> str:
  backend = getattr(tokenizer, "backend_tokenizer", None)
  words = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
  spec = {key: value for key, value in source.spec.items() if key not in ("path", "data_files", "directory")}
  parts = [VERSION, spec, source.digest, hashlib.sha256(words.encode()).hexdigest(), tokenizer.eos_token_id, length]
  return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _write(work: pathlib.Path, *, source: Source, tokenizer: PreTrainedTokenizerBase, length: int) -> dict[str, Any]:
  counts = {"documents": 0, "tokens": 0, "bytes": 0}
  rows = 0
  with (
    open(work / "tokens.raw", "wb") as tokens,
    open(work / "segments.raw", "wb") as segments,
    open(work / "learnt.raw", "wb") as learnt,
  ):
    for row in pack(_encode(source.documents(), tokenizer, counts), length=length):
      for file, part in zip((tokens, segments, learnt), row, strict=True):
        file.write(part.tobytes())
      rows += 1
  for name, dtype in _FILES.items():
    raw = work / f"{name}.raw"
    if rows:
      whole = np.lib.format.open_memmap(work / f"{name}.npy", mode="w+", dtype=dtype, shape=(rows, length))
      whole[:] = np.memmap(raw, dtype, mode="r", shape=(rows, length))
      whole.flush()
    raw.unlink()
  return {"rows": rows, "length": length, **counts, "source": dict(source.spec)}


def _encode(
  documents: Iterator[Document], tokenizer: PreTrainedTokenizerBase, counts: dict[str, int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Tokens and what is learnt of each document; ends with the end-of-text token, and has no start token."""
  for group in _batched(documents, 1000):
    prompts = tokenizer([one.prompt for one in group], add_special_tokens=False)["input_ids"]
    texts = tokenizer([one.text for one in group], add_special_tokens=False)["input_ids"]
    for document, prompt, text in zip(group, prompts, texts, strict=True):
      ids = np.asarray([*prompt, *text, tokenizer.eos_token_id], np.int32)
      counts["documents"] += 1
      counts["tokens"] += len(ids)
      counts["bytes"] += len(document.text.encode())
      yield ids, np.arange(len(ids)) >= len(prompt)


def _batched(items: Iterator[Document], size: int) -> Iterator[list[Document]]:
  while group := list(itertools.islice(items, size)):
    yield group
