"""A teacher that is a cache on disk."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jax.sharding import Mesh, NamedSharding

from distill.types import Batch, Capture, SparseSignal


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedTeacher:
  """A teacher with nothing in memory: its signal comes with each batch.

  Attributes:
    width: D, width of its hidden states.
    depth: Number of layers.
    vocab_size: V, number of tokens that have a probability.
    identity: Digest of the sections of the cache that the run reads.
  """

  width: int
  depth: int
  vocab_size: int
  identity: str
  config: ClassVar[None] = None

  @property
  def params(self) -> Mapping[str, Any]:
    """An empty dictionary: a cached teacher has no parameters."""
    return {}

  def shardings(self, mesh: Mesh) -> dict[str, NamedSharding]:
    """Returns an empty dictionary, as there are no parameters."""
    del mesh
    return {}

  def signal(self, params: Mapping[str, Any], *, batch: Batch, capture: Capture, dtype: Any) -> SparseSignal:
    """Returns `batch.signal`, which was read from the cache with the same `capture`."""
    del params, dtype
    assert batch.signal is not None, "a batch without the signal of the teacher cache"
    found = {name: tuple(getattr(batch.signal, name)) for name in ("layers", "mixers", "qkv")}
    assert Capture(**found) == capture, (found, capture)
    return batch.signal
