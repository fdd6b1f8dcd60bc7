"""The interface of a sequence mixer: softmax attention, a linear recurrence, or one that you add."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from distill.nn.param import Init


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadShape:
  """Numbers and widths of a mixer's heads.

  Attributes:
    heads: Number of heads N, whose outputs are concatenated before the output projection.
    key_heads: Number of key heads K; each is shared by N / K neighbouring heads.
    key_width: Width of one query or key.
    value_width: Width of one value.
  """

  heads: int
  key_heads: int
  key_width: int
  value_width: int


@runtime_checkable
class Mixer(Protocol):
  """A flax `nnx.Module` that mixes the positions of a sequence, such as attention.

  The output at a position depends on that position and on those before it in the same document, and on nothing else.
  All results are float32. If the outputs of the heads are concatenated before one output projection, that projection
  must be the attribute `o`: the importance of heads is measured at its input.
  """

  def __call__(
    self, x: Float[Array, "B T D"], *, segments: Int[Array, "B T"], positions: Int[Array, "B T"], dtype: DTypeLike
  ) -> Float[Array, "B T D"]:
    """Returns the mixed sequences of packed rows, float32.

    Args:
      x: Normalised residual stream, float32.
      segments: Number of each position's document within its row, from 1; 0 marks padding.
      positions: Position within the document, from 0.
      dtype: Dtype of the projections' operands.
    """

  def qkv(self, x: Float[Array, "B T D"], *, dtype: DTypeLike) -> tuple[Float[Array, "B T I"], ...]:
    """Returns the projections of x to queries, keys and values, each concatenated over heads.

    A mixer without queries, keys and values returns the three projections that take their roles.
    """

  def init_state(self, batch: int, *, length: int, dtype: DTypeLike) -> Any:
    """Returns the decoding state of empty rows, a pytree of arrays.

    Args:
      batch: Number of rows.
      length: Number of positions that each row may grow to.
      dtype: Dtype of a KV cache; a mixer with another kind of state may ignore it.
    """

  def prefill(
    self, x: Float[Array, "B T D"], *, lengths: Int[Array, " B"], length: int, dtype: DTypeLike
  ) -> tuple[Float[Array, "B T D"], Any]:
    """Mixes prompts; returns (outputs, decoding state).

    The state is the one that `lengths` calls of `step` would leave.

    Args:
      x: Normalised residual stream of rows of one document each, padded on the right.
      lengths: Number of positions of each row that are not padding; outputs past them are undefined.
      length: One number for all rows, unlike `lengths`: the most positions, prompt and drawn tokens together, that the
        decoding state must have room for.
      dtype: Dtype of the projections' operands.
    """

  def step(
    self, x: Float[Array, "B D"], *, state: Any, positions: Int[Array, " B"], dtype: DTypeLike
  ) -> tuple[Float[Array, "B D"], Any]:
    """Mixes the next position of each row; returns (output, new decoding state).

    The output equals that of `__call__` on the whole row at this position.

    Args:
      x: Normalised residual stream at the next position.
      state: The decoding state before that position.
      positions: Index of that position within the document of each row, from 0.
      dtype: Dtype of the projections' operands.
    """


@runtime_checkable
class MixerConfig(Protocol):
  """The configuration of a mixer. To add a mixer, write a configuration with these members, and its module.

  The configuration must be a frozen dataclass. Layers with equal configurations are stacked and scanned, and jit uses
  the configuration as a part of its cache key. Attributes that are the same for every instance can be a `ClassVar`:

      @dataclasses.dataclass(frozen=True, kw_only=True)
      class AverageConfig:
        kind: ClassVar[str] = "running average"
        exact_dtype: ClassVar[bool] = False
        bound_to_length: ClassVar[bool] = False
        head_shape: ClassVar[HeadShape | None] = None
        size: int

        @property
        def qkv_widths(self): return (self.size,) * 3

        def mixing_flops(self, length): return 2 * self.size

        def build(self, init, *, width, norm_eps, norm_offset): return Average(init, config=self, width=width)

  A decoder with the layer `LayerConfig(mixer=AverageConfig(size=8), …)` then trains and generates. To use the mixer in
  recipes and model directories, add a family to `checkpoints/families` that reads and writes its Hugging Face form.

  Two more steps are optional. An entry in `initialise.mixers.CONVERSIONS` makes the mixer of a student start from a
  mixer of a given type in its teacher. Without it, the student's mixer is a copy if both configurations are equal, and
  random if not. A colour in `evaluation/html.py` distinguishes the mixer in reports.
  """

  @property
  def kind(self) -> str:
    """A short name for reports, such as "attention"."""

  @property
  def head_shape(self) -> HeadShape | None:
    """Numbers and widths of the heads, or None for a mixer without heads."""

  @property
  def qkv_widths(self) -> tuple[int, int, int]:
    """Widths of the three arrays that `Mixer.qkv` returns."""

  @property
  def exact_dtype(self) -> bool:
    """True if rounding changes the output too much: the mixer is then always called with float32 as `dtype`."""

  @property
  def bound_to_length(self) -> bool:
    """True if the output at a position depends on the total length of its document or of the decoding state."""

  def mixing_flops(self, length: int) -> float:
    """Returns the forward FLOPs of one position, projections not counted, in documents of `length` positions."""

  def build(self, init: Init, *, width: int, norm_eps: float, norm_offset: float) -> Mixer:
    """Returns the mixer, an `nnx.Module` with fresh parameters.

    Args:
      init: Creates the parameters; every parameter must come from it, so that layers can be stacked.
      width: Model width D.
      norm_eps: Epsilon of norms inside the mixer.
      norm_offset: Added to the stored scales of norms inside the mixer: 1.0 in families that store scales minus one.
    """
