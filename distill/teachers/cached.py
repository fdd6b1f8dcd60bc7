"""A teacher that reads its signal from a teacher cache on disk."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jax.sharding import Mesh, NamedSharding

from distill.types import Batch, Capture, SparseSignal


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedTeacher:
  """A teacher without parameters: its signal was read from a teacher cache and comes with each batch (`Batch.signal`).

  Attributes:
    width: D, width of the teacher's hidden states.
    depth: Number of layers.
    vocab_size: V, vocabulary size without padding.
    identity: Digest of the cache sections that the run reads.
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
    """Returns an empty dictionary: a cached teacher has no parameters."""
    del mesh
    return {}

  def signal(self, params: Mapping[str, Any], *, batch: Batch, capture: Capture, dtype: Any) -> SparseSignal:
    """Returns `batch.signal`, which must hold exactly the activations in `capture`.

    `params` and `dtype` are ignored, as no model runs.
    """
    del params, dtype
    assert batch.signal is not None, "the batch has no signal from the teacher cache"
    found = {name: tuple(getattr(batch.signal, name)) for name in ("layers", "mixers", "qkv")}
    assert Capture(**found) == capture, (found, capture)
    return batch.signal
