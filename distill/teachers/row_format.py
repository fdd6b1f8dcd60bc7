"""Packs one row of a teacher cache into bytes, and unpacks it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from distill.teachers.targets import Targets, read_targets
from distill.types import Capture, SparseSignal

_SHARD_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowFormat:
  """The encoding of one row of a teacher cache: its activations in bfloat16, then its packed targets.

  Attributes:
    targets: Kind of the sparse targets.
    length: Number of positions in a row, T.
    id_bits: Number of bits of a token id.
    capture: Names the activations that a row stores: first outputs of layers, then outputs of mixers, both in ascending
      order of the layers.
    width: Width D of the activations.
  """

  targets: Targets
  length: int
  id_bits: int
  capture: Capture
  width: int

  @property
  def max_bytes(self) -> int:
    """Returns the largest size of one row in bytes; rows of sampled targets may be smaller."""
    activations = 2 * self.width * (len(self.capture.layers) + len(self.capture.mixers))
    return int(self.length * (self.targets.bytes_a_token(self.id_bits) + activations)) + 2

  def pack(self, targets: Sequence[np.ndarray], activations: Sequence[np.ndarray]) -> bytes:
    """Returns the bytes of one row: its activations, then its targets.

    Args:
      targets: The row's arrays of `Targets.select`, without their batch axis.
      activations: Outputs [T,D] of the layers, then of the mixers, that `self.capture` names.
    """
    rounded = [np.asarray(x, ml_dtypes.bfloat16).view(np.uint16) for x in activations]
    packed = self.targets.pack(tuple(targets), id_bits=self.id_bits)
    return b"".join(x.astype("<u2").tobytes() for x in rounded) + packed

  def unpack(self, data: bytes, capture: Capture) -> SparseSignal:
    """Returns a row's sparse target [T,k] and its activations [T,D] named in `capture`, all of which must be stored."""
    count = self.length * self.width
    layers, mixers = self.capture.layers, self.capture.mixers

    def activation(slot: int) -> Any:
      bits = np.frombuffer(data, "<u2", count, offset=2 * count * slot).astype(np.uint16)
      return bits.view(ml_dtypes.bfloat16).reshape(self.length, self.width)

    targets = data[2 * count * (len(layers) + len(mixers)) :]
    return SparseSignal(
      target=self.targets.unpack(targets, length=self.length, id_bits=self.id_bits),
      layers={layer: activation(layers.index(layer)) for layer in capture.layers},
      mixers={layer: activation(len(layers) + mixers.index(layer)) for layer in capture.mixers},
    )

  def rows_per_shard(self, batch_size: int) -> int:
    """Returns the number of rows in a shard of about 64 MiB: whole batches, at least one."""
    return batch_size * max(1, _SHARD_BYTES // (self.max_bytes * batch_size))


def row_format(manifest: Mapping[str, Any], *, where: str) -> RowFormat:
  """Returns the format of the rows that a manifest describes.

  Args:
    manifest: Parsed manifest of a section.
    where: File or key that the manifest comes from; error messages begin with it.

  Raises:
    InputError: The kind, size or temperature of the targets is invalid.
  """
  vocab = int(manifest["vocab_size"])
  return RowFormat(
    targets=read_targets(manifest, where=where, vocab=vocab),
    length=int(manifest["length"]),
    id_bits=max(1, (vocab - 1).bit_length()),
    capture=Capture(layers=tuple(map(int, manifest["layers"])), mixers=tuple(map(int, manifest["mixers"]))),
    width=int(manifest["width"]),
  )
