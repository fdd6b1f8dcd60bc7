"""The contract of a sequence mixer: softmax attention, a linear recurrence, or one of your own."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from distill.nn.param import Init


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadShape:
  """Numbers and widths of a mixer's heads, which decide whether heads of another mixer fit into it.

  Attributes:
    heads: Number of heads N, whose outputs stand side by side before the output projection.
    key_heads: Number of key heads K; each serves N / K neighbouring heads.
    key_width: Width of one query or key.
    value_width: Width of one value.
  """

  heads: int
  key_heads: int
  key_width: int
  value_width: int


@runtime_checkable
class Mixer(Protocol):
  """A module that mixes a sequence: each position reads its own document up to itself, and nothing else.

  A flax `nnx.Module`. If its heads' outputs stand side by side before one output projection, that projection is called
  `o`: importance of heads is measured at its input. All results are float32.
  """

  def __call__(
    self, x: Float[Array, "B T D"], *, segments: Int[Array, "B T"], positions: Int[Array, "B T"], dtype: DTypeLike
  ) -> Float[Array, "B T D"]:
    """Mixes packed rows.

    Args:
      x: Normalised residual stream, float32.
      segments: Number of each position's document within its row, from 1; 0 marks padding.
      positions: Position within the document, from 0.
      dtype: Dtype of the projections' operands.
    """

  def qkv(self, x: Float[Array, "B T D"], *, dtype: DTypeLike) -> tuple[Float[Array, "B T I"], ...]:
    """Returns queries, keys and values, or the mixer's counterparts, as projected; all heads are side by side."""

  def init_state(self, batch: int, *, length: int, dtype: DTypeLike) -> Any:
    """Returns the decoding state of `batch` empty rows that grow to `length` positions: a pytree of arrays."""

  def prefill(
    self, x: Float[Array, "B T D"], *, lengths: Int[Array, " B"], length: int, dtype: DTypeLike
  ) -> tuple[Float[Array, "B T D"], Any]:
    """Mixes prompts and returns the decoding state that `lengths` calls of `step` would leave.

    Args:
      x: Rows of one document each, padded on the right.
      lengths: Positions of each row that are not padding; outputs past them are undefined.
      length: Positions that each row grows to.
      dtype: Dtype of the projections' operands.
    """

  def step(
    self, x: Float[Array, "B D"], *, state: Any, positions: Int[Array, " B"], dtype: DTypeLike
  ) -> tuple[Float[Array, "B D"], Any]:
    """Mixes the next position of each row and returns the new decoding state; equals a call on the whole row.

    Args:
      x: Normalised residual stream at that position.
      state: The decoding state before it.
      positions: Index of this position within the document of each row, from 0.
      dtype: Dtype of the projections' operands.
    """


@runtime_checkable
class MixerConfig(Protocol):
  """The configuration of a mixer. To add a mixer, write this class and its module; nothing else has to change.

  The configuration is a frozen dataclass: layers with equal ones are stacked and scanned, and compilations are looked
  up by them. Attributes that are the same for every instance can be a `ClassVar`:

      @dataclasses.dataclass(frozen=True, kw_only=True)
      class AverageConfig:
        kind: ClassVar[str] = "running average"
        exact_dtype: ClassVar[bool] = False
        bound_to_length: ClassVar[bool] = False
        head_shape: ClassVar[HeadShape | None] = None
        size: int

        @property
        def qkv_widths(self): return (self.size,) * 3

        def build(self, init, *, width, norm_eps, norm_offset): return Average(init, config=self, width=width)

  `LayerConfig(mixer=AverageConfig(size=8), …)` then gives a decoder that trains and generates. For recipes and model
  directories a family in `checkpoints/families` reads and writes its Hugging Face form. Two steps are optional: a row
  in `initialise.mixers.CONVERSIONS` says what the mixer takes from a teacher's (without one it stays fresh, or is
  copied from an equal one); a colour in `evaluation/html.py` tells it apart in reports.
  """

  @property
  def kind(self) -> str:
    """A short name for reports, such as "attention"."""

  @property
  def head_shape(self) -> HeadShape | None:
    """Numbers and widths of the heads, or None for a mixer without heads."""

  @property
  def qkv_widths(self) -> tuple[int, int, int]:
    """Widths of what `Mixer.qkv` returns."""

  @property
  def exact_dtype(self) -> bool:
    """True if operands must stay float32 whatever the dtype of the computation, as rounding changes the output much."""

  @property
  def bound_to_length(self) -> bool:
    """True if a position's output depends on the length of its document, or on that of the decoding state."""

  def build(self, init: Init, *, width: int, norm_eps: float, norm_offset: float) -> Mixer:
    """Makes the module with fresh parameters.

    Args:
      init: Maker of the parameters; every parameter comes from it, so that layers stack.
      width: Model width D.
      norm_eps: Epsilon of norms inside the mixer.
      norm_offset: Added to stored scales of norms inside the mixer, in families that store scales minus an offset.
    """
