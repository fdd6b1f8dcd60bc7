"""The teacher protocol: everything that turns a `Batch` into a `TeacherSignal`."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jax.sharding import Mesh, NamedSharding

from distill.models.config import DecoderConfig
from distill.types import Batch, Capture, TeacherSignal


@runtime_checkable
class Teacher(Protocol):
  """A source of the next-token distributions and activations that a student learns from."""

  @property
  def depth(self) -> int:
    """Number of layers."""

  @property
  def width(self) -> int:
    """Width D of the hidden states."""

  @property
  def vocab_size(self) -> int:
    """Vocabulary size V, without padding."""

  @property
  def config(self) -> DecoderConfig | None:
    """Architecture, or None for a cached teacher, of which only depth, width and vocabulary size are known."""

  @property
  def identity(self) -> str:
    """Digest of the teacher cache that is read, compared when a run resumes; empty for a live teacher."""

  @property
  def params(self) -> Mapping[str, Any]:
    """Parameters to pass to `signal`; empty for a cached teacher."""

  def shardings(self, mesh: Mesh) -> dict[str, NamedSharding]:
    """Returns the sharding of every parameter on `mesh`."""

  def signal(self, params: Mapping[str, Any], *, batch: Batch, capture: Capture, dtype: Any) -> TeacherSignal:
    """Returns the teacher's next-token distributions for `batch`, and the captured activations.

    Each row is computed with the adapters that `batch.routes` selects for it. The method is pure and can be traced by
    JAX. No gradient flows into the teacher.

    Args:
      params: The teacher's `params`, passed so that a jitted step takes them as an argument, not as constants.
      batch: Rows of tokens; with a teacher cache, `batch.signal` holds the signal that was read for these rows.
      capture: Activations to return with the distributions.
      dtype: Dtype of the operands of projections.
    """
