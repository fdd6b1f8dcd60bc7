"""A teacher that is a cache on disk."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from distill.types import Batch, SparseSignal


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedTeacher:
  """A teacher of which there is nothing in memory: its signal comes with each batch.

  Attributes:
    width: D of its hidden states.
    depth: Its layers.
    identity: Digest of all that was kept.
  """

  width: int
  depth: int
  identity: str
  params: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def shardings(self, mesh: Mesh) -> dict[str, Any]:
    """Of no parameters."""
    del mesh
    return {}

  def signal(
    self,
    params: Mapping[str, Any],
    *,
    batch: Batch,
    capture: tuple[int, ...],
    mixers: tuple[int, ...],
    related: tuple[int, ...],
    dtype: Any,
  ) -> SparseSignal:
    """What the cache has for `batch`, which was read with these layers and mixers."""
    del params, dtype
    assert not related, "relations of a cached teacher"
    assert batch.cached is not None, "a batch without what the cache has for it"
    assert (len(batch.cached.captured), len(batch.cached.mixed)) == (len(capture), len(mixers))
    return batch.cached
