"""What is kept of a teacher's next-token distributions: its likeliest tokens and their tail, or tokens drawn from it.

Each kind is a value that makes its arrays on the device, and packs them into bytes and back on the host.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

from distill.errors import InputError
from distill.losses.chunked import chunk_tokens
from distill.losses.partitions import bucket_log_probs
from distill.types import Readout, SparseTarget

Kept = tuple[Array, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK:
  """The `size` likeliest tokens with their log-probabilities in float16, and the tail's; nothing is renormalised."""

  size: int = 64
  temperature: float = 1.0
  # The targets are a random sample of the distribution.
  sampled: ClassVar[bool] = False

  def keep(self, hidden: Float[Array, "B T D"], readout: Readout, *, keys: Key[Array, " B"]) -> Kept:
    """ids [B,T,k], log_probs [B,T,k] and tail [B,T]; logits exist for a chunk of tokens at a time."""
    del keys

    def kept(logits_MV, _):
      logits_MV = logits_MV / self.temperature
      ids = jax.lax.top_k(logits_MV, self.size)[1]
      log_probs = bucket_log_probs(logits_MV, ids).astype(jnp.float16)
      return ids, log_probs[:, :-1], log_probs[:, -1]

    return _walk(kept, hidden, readout, ())

  def bytes_a_token(self, bits: int) -> float:
    """Room on disk for ids of so many bits."""
    return self.size * (bits + 16) / 8 + 2

  def pack(self, kept: tuple[np.ndarray, ...], *, bits: int) -> bytes:
    """One row, ids [T,k], log_probs [T,k] and tail [T], as bytes."""
    ids, log_probs, tail = kept
    return log_probs.astype("<f2").tobytes() + tail.astype("<f2").tobytes() + pack(ids.reshape(-1), bits=bits).tobytes()

  def unpack(self, data: bytes, *, length: int, bits: int) -> SparseTarget:
    """The target of one row of `length` tokens."""
    many, few = length * self.size, length
    numbers = np.frombuffer(data, "<f2", many + few).astype(np.float32)
    ids = unpack(np.frombuffer(data, np.uint8, offset=2 * (many + few)), bits=bits, count=many)
    return _target(ids.reshape(length, -1), numbers[:many].reshape(length, -1), numbers[many:])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled:
  """`size` tokens drawn from the teacher a position, as ids and counts (random-sampling KD, 2503.16870).

  Draws are systematic: at (u + n) / size of the cumulative distribution, with one uniform u a position. A token's
  expected share is its probability, as with independent draws, and varies less.
  """

  size: int = 50
  temperature: float = 1.0
  sampled: ClassVar[bool] = True

  def keep(self, hidden: Float[Array, "B T D"], readout: Readout, *, keys: Key[Array, " B"]) -> Kept:
    """ids [B,T,N] in ascending order, each as often as it was drawn.

    `keys` are one a row, of the row alone, so that the draws do not depend on the batch it is in.
    """
    offsets = jax.vmap(lambda key: jax.random.uniform(key, hidden.shape[1:2]))(keys)

    def drawn(logits_MV, offset_M):
      cumulative = jnp.cumsum(jax.nn.softmax(logits_MV / self.temperature, axis=-1), axis=-1)
      # Sums of float32 do not end at exactly 1, and a token without probability must not be drawn.
      points = (offset_M[:, None] + jnp.arange(self.size)) / self.size * cumulative[:, -1:]
      found = jax.vmap(lambda steps, at: jnp.searchsorted(steps, at, side="right"))(cumulative, points)
      last = jnp.argmax(cumulative, axis=-1)
      return (jnp.minimum(found, last[:, None]).astype(jnp.int32),)

    return _walk(drawn, hidden, readout, offsets)

  def bytes_a_token(self, bits: int) -> float:
    """Most room on disk for ids of so many bits; published models need about 12 of 50 different ids."""
    return self.size * (bits + 1) / 8

  def pack(self, kept: tuple[np.ndarray, ...], *, bits: int) -> bytes:
    """One row, ids [T,N] in ascending order, as bytes: a bit a draw that tells where a new id begins, then these."""
    (ids,) = kept
    new = np.ones(ids.shape, bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return np.packbits(new, bitorder="little").tobytes() + pack(ids[new], bits=bits).tobytes()

  def unpack(self, data: bytes, *, length: int, bits: int) -> SparseTarget:
    """The target of one row of `length` tokens: log(count / size) of the ids that were drawn, and no tail."""
    many = length * self.size
    head = -(-many // 8)
    new = np.unpackbits(np.frombuffer(data, np.uint8, head), count=many, bitorder="little").astype(bool)
    starts = np.flatnonzero(new)
    counts = np.diff(starts, append=many)
    found = unpack(np.frombuffer(data, np.uint8, offset=head), bits=bits, count=len(starts))
    row = starts // self.size
    place = np.arange(len(starts)) - np.searchsorted(row, np.arange(length))[row]
    ids = np.full((length, self.size), -1, np.int32)
    log_probs = np.full((length, self.size), -np.inf, np.float32)
    ids[row, place], log_probs[row, place] = found, np.log(counts / self.size)
    return _target(ids, log_probs, np.full(length, -np.inf, np.float32))


Targets = TopK | Sampled
KINDS: Mapping[str, type[Targets]] = {"top_k": TopK, "sampled": Sampled}


def targets(spec: Mapping[str, Any], *, where: str, vocab: int) -> Targets:
  """The value that {"targets": kind, "size", "temperature"} describes, for a vocabulary.

  Raises:
    InputError: Unknown kind, or a number that is none or out of range.
  """
  kind, size, temperature = spec.get("targets"), spec.get("size"), spec.get("temperature")
  if not isinstance(kind, str) or kind not in KINDS:
    raise InputError(f"{where}.targets: {kind!r}; use one of {', '.join(KINDS)}")
  most = vocab - 1 if kind == "top_k" else 255
  if type(size) is not int or not 1 <= size <= most:
    raise InputError(f"{where}.size: {size!r}; use a whole number from 1 to {most}")
  if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < 1e3:
    raise InputError(f"{where}.temperature: {temperature!r}; use a number above 0")
  return KINDS[kind](size=size, temperature=float(temperature))


def _target(ids: Any, log_probs: Any, tail: Any) -> SparseTarget:
  """Of arrays on the host."""
  return SparseTarget(ids=ids, log_probs=log_probs, tail=tail)


def pack(values: Int[np.ndarray, " M"], *, bits: int) -> UInt8[np.ndarray, " N"]:
  """The lowest `bits` bits of each value, one after another, the lowest first."""
  each = np.unpackbits(values.astype("<u4").view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")
  return np.packbits(each[:, :bits], bitorder="little")


def unpack(data: UInt8[np.ndarray, " N"], *, bits: int, count: int) -> Int[np.ndarray, " M"]:
  """The `count` values that were packed."""
  each = np.zeros((count, 32), np.uint8)
  each[:, :bits] = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
  return np.packbits(each, axis=1, bitorder="little").view("<u4")[:, 0].astype(np.int32)


def _walk(keep: Callable[[Any, Any], Kept], hidden, readout, beside) -> Kept:
  """keep(logits, what lies beside) of every position, some positions of all rows at a time."""
  rows, length = hidden.shape[:2]
  size = max(1, chunk_tokens(readout.kernel.shape[-1], tokens=rows * length) // rows)
  chunks = -(-length // size)

  def cut(x):
    x = jnp.pad(x, [(0, 0), (0, chunks * size - length)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(rows, chunks, size, *x.shape[2:]).swapaxes(0, 1)

  def one(part):
    hidden, beside = part
    logits = readout.logits(hidden.reshape(rows * size, -1))[:, : readout.vocab_size]
    found = keep(logits, jax.tree.map(lambda x: x.reshape(rows * size, *x.shape[2:]), beside))
    return jax.tree.map(lambda x: x.reshape(rows, size, *x.shape[1:]), found)

  def joined(x):
    return x.swapaxes(0, 1).reshape(rows, chunks * size, *x.shape[3:])[:, :length]

  return jax.tree.map(joined, jax.lax.map(one, (cut(hidden), jax.tree.map(cut, beside))))
