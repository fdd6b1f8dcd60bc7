"""Sparse targets in a teacher cache: the teacher's most probable tokens, or tokens drawn from its distribution.

Each kind selects its arrays on the device, and packs them into bytes and back on the host.
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

TargetArrays = tuple[Array, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK:
  """Targets of the `size` most probable tokens at each position, as ids with log-probabilities in float16.

  One more log-probability, the tail, is that of all other tokens together. Nothing is renormalised.
  """

  size: int = 64
  temperature: float = 1.0
  # The targets are a random sample of the distribution.
  sampled: ClassVar[bool] = False

  def select(self, hidden: Float[Array, "B T D"], readout: Readout, *, keys: Key[Array, " B"]) -> TargetArrays:
    """Returns ids [B,T,k] and log_probs [B,T,k] of the most probable tokens, and tail [B,T] of all others together.

    Log-probabilities are float32; `pack` rounds them. Positions are computed in chunks, so that logits of the whole
    batch are never in memory. `keys` is ignored, because nothing is drawn at random.
    """
    del keys

    def top(logits_MV, _):
      logits_MV = logits_MV / self.temperature
      ids = jax.lax.top_k(logits_MV, self.size)[1]
      log_probs = bucket_log_probs(logits_MV, ids)
      return ids, log_probs[:, :-1], log_probs[:, -1]

    return _map_positions(top, hidden, readout, ())

  def bytes_a_token(self, id_bits: int) -> float:
    """Returns the size in bytes of one position's targets on disk; a token id takes `id_bits` bits."""
    return self.size * (id_bits + 16) / 8 + 2

  def pack(self, arrays: tuple[np.ndarray, ...], *, id_bits: int) -> bytes:
    """Returns the bytes of one row: log_probs and tail as float16, then the ids.

    Args:
      arrays: (ids [T,k], log_probs [T,k], tail [T]) of the row.
      id_bits: Number of bits that a token id takes.
    """
    ids, log_probs, tail = arrays
    # Rounded here and not on the device: the CPU code of XLA (jaxlib 0.10.2) has no conversion to float16 for a CPU
    # without the F16C instructions, and fails with "Symbols not found: [ __truncsfhf2 ]".
    return (
      log_probs.astype("<f2").tobytes() + tail.astype("<f2").tobytes() + pack(ids.reshape(-1), bits=id_bits).tobytes()
    )

  def unpack(self, data: bytes, *, length: int, id_bits: int) -> SparseTarget:
    """Returns the sparse target of a row of `length` positions from the bytes that `pack` returned.

    `id_bits` is the number of bits that a token id takes.
    """
    many, few = length * self.size, length
    numbers = np.frombuffer(data, "<f2", many + few).astype(np.float32)
    ids = unpack(np.frombuffer(data, np.uint8, offset=2 * (many + few)), bits=id_bits, count=many)
    return _target(ids.reshape(length, -1), numbers[:many].reshape(length, -1), numbers[many:])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled:
  """Targets of `size` tokens drawn from the teacher at each position (random-sampling KD, 2503.16870).

  Sampling is systematic: draw n is the token at (u + n) / size of the cumulative distribution, with one uniform u in
  [0, 1) for each position. As with independent draws, a token's expected share of the draws is its probability; the
  share varies less.
  """

  size: int = 50
  temperature: float = 1.0
  sampled: ClassVar[bool] = True

  def select(self, hidden: Float[Array, "B T D"], readout: Readout, *, keys: Key[Array, " B"]) -> TargetArrays:
    """Draws `size` token ids for each position; returns a tuple of one array [B,T,size], ascending, with repeated ids.

    Each row has a random key of its own, so that its draws do not depend on the other rows of the batch.
    """
    offsets = jax.vmap(lambda key: jax.random.uniform(key, hidden.shape[1:2]))(keys)

    def drawn(logits_MV, offset_M):
      cumulative = jnp.cumsum(jax.nn.softmax(logits_MV / self.temperature, axis=-1), axis=-1)
      # Scaled to the last sum, which float32 leaves a little off 1: a token without probability must not be drawn.
      points = (offset_M[:, None] + jnp.arange(self.size, dtype=jnp.float32)[None, :]) / self.size * cumulative[:, -1:]
      found = jax.vmap(lambda steps, at: jnp.searchsorted(steps, at, side="right"))(cumulative, points)
      last = jnp.argmax(cumulative, axis=-1)
      return (jnp.minimum(found, last[:, None]).astype(jnp.int32),)

    return _map_positions(drawn, hidden, readout, offsets)

  def bytes_a_token(self, id_bits: int) -> float:
    """Returns the size in bytes of one position's targets on disk if all drawn ids differ; an id takes `id_bits` bits.

    Repeated ids take less: published models draw about 12 different ids in 50.
    """
    return self.size * (id_bits + 1) / 8

  def pack(self, arrays: tuple[np.ndarray, ...], *, id_bits: int) -> bytes:
    """Returns the bytes of one row of drawn ids.

    First comes a bit for each draw: 0 if its id repeats that of the position's previous draw, else 1. The ids of all
    draws with a 1 follow.

    Args:
      arrays: (ids,), the drawn ids [T,size], ascending at each position.
      id_bits: Number of bits that a token id takes.
    """
    (ids,) = arrays
    new = np.ones(ids.shape, bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return np.packbits(new, bitorder="little").tobytes() + pack(ids[new], bits=id_bits).tobytes()

  def unpack(self, data: bytes, *, length: int, id_bits: int) -> SparseTarget:
    """Returns the sparse target of a row of `length` positions from the bytes that `pack` returned.

    The probability of an id is the number of times that it was drawn, divided by the number of draws. The tail, all
    other ids together, has probability zero.
    """
    many = length * self.size
    head = -(-many // 8)
    new = np.unpackbits(np.frombuffer(data, np.uint8, head), count=many, bitorder="little").astype(bool)
    starts = np.flatnonzero(new)
    counts = np.diff(starts, append=many)
    found = unpack(np.frombuffer(data, np.uint8, offset=head), bits=id_bits, count=len(starts))
    row = starts // self.size
    place = np.arange(len(starts)) - np.searchsorted(row, np.arange(length))[row]
    ids = np.full((length, self.size), -1, np.int32)
    log_probs = np.full((length, self.size), -np.inf, np.float32)
    ids[row, place], log_probs[row, place] = found, np.log(counts / self.size)
    return _target(ids, log_probs, np.full(length, -np.inf, np.float32))


Targets = TopK | Sampled
KINDS: Mapping[str, type[Targets]] = {"top_k": TopK, "sampled": Sampled}


def read_targets(spec: Mapping[str, Any], *, where: str, vocab: int) -> Targets:
  """Returns the sparse targets that a recipe or a manifest describes: their kind, size and temperature.

  Args:
    spec: Mapping with the keys `targets` (the kind), `size` and `temperature`.
    where: File or key that `spec` comes from; error messages begin with it.
    vocab: Vocabulary size V.

  Raises:
    InputError: The kind is unknown, or a number is wrong or out of range.
  """
  kind, size, temperature = spec.get("targets"), spec.get("size"), spec.get("temperature")
  if not isinstance(kind, str) or kind not in KINDS:
    raise InputError(f"{where}.targets: got {kind!r}; use one of {', '.join(KINDS)}")
  largest = vocab - 1 if kind == "top_k" else 255
  if type(size) is not int or not 1 <= size <= largest:
    raise InputError(f"{where}.size: got {size!r}; use a whole number from 1 to {largest}")
  if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < 1e3:
    raise InputError(f"{where}.temperature: got {temperature!r}; use a number above 0 and below 1000")
  return KINDS[kind](size=size, temperature=float(temperature))


def _target(ids: Any, log_probs: Any, tail: Any) -> SparseTarget:
  """Returns a sparse target of NumPy arrays, untyped here because `SparseTarget` declares JAX arrays."""
  return SparseTarget(ids=ids, log_probs=log_probs, tail=tail)


def pack(values: Int[np.ndarray, " count"], *, bits: int) -> UInt8[np.ndarray, " bytes"]:
  """Packs the lowest `bits` bits of each value side by side into bytes, least significant bit first."""
  each = np.unpackbits(values.astype("<u4").view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")
  return np.packbits(each[:, :bits], bitorder="little")


def unpack(data: UInt8[np.ndarray, " bytes"], *, bits: int, count: int) -> Int[np.ndarray, " count"]:
  """Returns the `count` values that `pack` packed with the same `bits`."""
  each = np.zeros((count, 32), np.uint8)
  each[:, :bits] = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
  return np.packbits(each, axis=1, bitorder="little").view("<u4")[:, 0].astype(np.int32)


def _map_positions(function: Callable[[Any, Any], TargetArrays], hidden, readout, extra) -> TargetArrays:
  """Applies function(logits [M,V], extra [M,…]) to chunks of positions of all rows, and joins its arrays to [B,T,…].

  `readout` turns `hidden` [B,T,D] into logits. `extra` is a pytree of arrays [B,T,…].
  """
  rows, length = hidden.shape[:2]
  size = max(1, chunk_tokens(readout.kernel.shape[-1], tokens=rows * length) // rows)
  chunks = -(-length // size)

  def split(x):
    x = jnp.pad(x, [(0, 0), (0, chunks * size - length)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(rows, chunks, size, *x.shape[2:]).swapaxes(0, 1)

  def one(chunk):
    hidden, extra = chunk
    logits = readout.logits(hidden.reshape(rows * size, -1))[:, : readout.vocab_size]
    arrays = function(logits, jax.tree.map(lambda x: x.reshape(rows * size, *x.shape[2:]), extra))
    return jax.tree.map(lambda x: x.reshape(rows, size, *x.shape[1:]), arrays)

  def joined(x):
    return x.swapaxes(0, 1).reshape(rows, chunks * size, *x.shape[3:])[:, :length]

  return jax.tree.map(joined, jax.lax.map(one, (split(hidden), jax.tree.map(split, extra))))
