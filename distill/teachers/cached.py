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
    """No parameters."""
    return {}

  def shardings(self, mesh: Mesh) -> dict[str, NamedSharding]:
    """Returns the shardings of no parameters."""
    del mesh
    return {}

  def signal(self, params: Mapping[str, Any], *, batch: Batch, capture: Capture, dtype: Any) -> SparseSignal:
    """Returns the signal that the cache has for `batch`, which was read with this `capture`."""
    del params, dtype
    assert batch.signal is not None, "a batch without the signal of the teacher cache"
    found = {name: tuple(getattr(batch.signal, name)) for name in ("layers", "mixers", "qkv")}
    assert Capture(**found) == capture, (found, capture)
    return batch.signal
