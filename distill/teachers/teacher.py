"""The teacher protocol: everything that turns a `Batch` into a `TeacherSignal`."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jax.sharding import Mesh, NamedSharding

from distill.models.config import DecoderConfig
from distill.types import Batch, Capture, TeacherSignal


@runtime_checkable
class Teacher(Protocol):
  """A source of next-token distributions and activations to learn from."""

  @property
  def depth(self) -> int:
    """Number of layers."""

  @property
  def width(self) -> int:
    """D, width of the hidden states."""

  @property
  def vocab_size(self) -> int:
    """V, number of tokens that have a probability."""

  @property
  def config(self) -> DecoderConfig | None:
    """Architecture, or None where only the numbers above are known."""

  @property
  def identity(self) -> str:
    """Digest of the cache that the signal is read from, checked when a run resumes; empty for a live teacher."""

  @property
  def params(self) -> Mapping[str, Any]:
    """Parameters to pass to `signal`; empty for a cached teacher."""

  def shardings(self, mesh: Mesh) -> dict[str, NamedSharding]:
    """Returns the sharding of every parameter on `mesh`."""

  def signal(self, params: Mapping[str, Any], *, batch: Batch, capture: Capture, dtype: Any) -> TeacherSignal:
    """Returns the teacher's distributions for `batch`, each row under its route, and the captured activations.

    It is pure and may be traced. No gradient flows through it.

    Args:
      params: The teacher's `params`, passed so that a jitted step takes them as an argument, not as constants.
      batch: Rows of tokens; `batch.signal` holds what a teacher cache has for them.
      capture: Activations to return beside the distributions.
      dtype: Dtype of the operands of projections.
    """
