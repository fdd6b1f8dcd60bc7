"""What the families share: reading an HF configuration strictly, and rows of their name tables."""

from collections.abc import Collection, Mapping
from typing import Any

from distill.errors import InputError
from distill.models.config import Rope
from distill.models.families.mapping import Entry

# Attributes that say nothing about the function a model computes.
BOOKKEEPING = frozenset(
  [
    "architectures",
    "model_type",
    "transformers_version",
    "_name_or_path",
    "torch_dtype",
    "dtype",
    "use_cache",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
    "id2label",
    "label2id",
    "problem_type",
    "initializer_range",
    "attention_dropout",
    "pretraining_tp",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tokenizer_class",
    "_attn_implementation",
    "auto_map",
    "unsloth_version",
    "unsloth_fixed",
  ]
)


class Attributes:
  """An HF configuration from which every attribute must be taken, or be known not to matter."""

  def __init__(self, values: Mapping[str, Any], *, where: str):
    self._left = {key: value for key, value in values.items() if key not in BOOKKEEPING}
    self._where = where

  def take(self, key: str, default: Any = None) -> Any:
    """The attribute, or the default when it is absent or null.

    Raises:
      InputError: It is absent and there is no default.
    """
    value = self._left.pop(key, None)
    if value is None and default is None:
      raise InputError(f"{self._where}: {key} is missing")
    return default if value is None else value

  def only(self, key: str, allowed: Collection[Any]) -> None:
    """Refuses the attribute unless it is absent or one of the values that our layers compute.

    Raises:
      InputError: Another value.
    """
    value = self._left.pop(key, None)
    if value is not None and value not in allowed:
      raise InputError(f"{self._where}: {key} = {value!r} is not supported; expected {' or '.join(map(repr, allowed))}")

  def rope(self, *, fraction: float = 1.0) -> Rope:
    """Rotary settings in the form of version 5 (`rope_parameters`) or before (`rope_theta`, `rope_scaling`).

    Raises:
      InputError: A kind of scaling that is not 'default' or 'llama3'.
    """
    fields = dict(self._left.pop("rope_scaling", None) or {})
    fields |= self._left.pop("rope_parameters", None) or {}
    for key in ("rope_theta", "partial_rotary_factor"):
      value = self._left.pop(key, None)
      if value is not None:
        fields.setdefault(key, value)
    theta = float(fields.pop("rope_theta", 10_000.0))
    fraction = float(fields.pop("partial_rotary_factor", fraction))
    kind = fields.pop("rope_type", fields.pop("type", "default"))
    fields.pop("type", None)
    if kind == "llama3":
      names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
      missing = [name for name in names if name not in fields]
      if missing:
        raise InputError(f"{self._where}: llama3 rope without {missing[0]}")
      factor, low, high, original = (fields.pop(name) for name in names)
      llama3 = (float(factor), float(low), float(high), int(original))
    elif kind == "default":
      llama3 = None
    else:
      raise InputError(f"{self._where}: rope type {kind!r} is not supported; expected 'default' or 'llama3'")
    # Interleaved image axes coincide with plain positions on text.
    fields = {key: value for key, value in fields.items() if not key.startswith("mrope_")}
    if fields:
      raise InputError(f"{self._where}: unknown rope setting {min(fields)}")
    return Rope(theta=theta, fraction=fraction, llama3=llama3)

  def finish(self) -> None:
    """Refuses what was not taken and is not null or off.

    Raises:
      InputError: An attribute that this family does not know.
    """
    for key, value in self._left.items():
      if value not in (None, False, {}, []):
        raise InputError(f"{self._where}: {key} = {value!r} is not understood; its effect would be lost")


def write_rope(rope: Rope) -> dict[str, Any]:
  """`rope_parameters` of version 5."""
  fields: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": "default"}
  if rope.llama3 is not None:
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    fields |= {"rope_type": "llama3", **dict(zip(names, rope.llama3, strict=True))}
  if rope.fraction != 1.0:
    fields["partial_rotary_factor"] = rope.fraction
  return fields


def linear(ours: str, theirs: str, *, bias: bool = False) -> list[Entry]:
  """Rows of one projection."""
  kernel = Entry(f"{ours}.kernel", f"{theirs}.weight", "transpose")
  return [kernel, Entry(f"{ours}.bias", f"{theirs}.bias")] if bias else [kernel]


def frame(*, tied: bool) -> list[Entry]:
  """Embedding, final norm and head."""
  rows = [Entry("embed.table", "model.embed_tokens.weight"), Entry("norm.scale", "model.norm.weight")]
  return rows if tied else [*rows, *linear("head", "lm_head")]


def block(index: int, *, mlp_bias: bool) -> list[Entry]:
  """Norms and MLP of one layer."""
  ours, theirs = f"layers.{index}", f"model.layers.{index}"
  rows = [
    Entry(f"{ours}.mixer_norm.scale", f"{theirs}.input_layernorm.weight"),
    Entry(f"{ours}.mlp_norm.scale", f"{theirs}.post_attention_layernorm.weight"),
  ]
  for name in ("gate", "up", "down"):
    rows += linear(f"{ours}.mlp.{name}", f"{theirs}.mlp.{name}_proj", bias=mlp_bias)
  return rows


def attention(index: int, *, bias: bool, out_bias: bool, qk_norm: bool) -> list[Entry]:
  """Projections and norms of one attention layer."""
  ours, theirs = f"layers.{index}.mixer", f"model.layers.{index}.self_attn"
  rows = [row for name in "qkv" for row in linear(f"{ours}.{name}", f"{theirs}.{name}_proj", bias=bias)]
  rows += linear(f"{ours}.o", f"{theirs}.o_proj", bias=out_bias)
  if qk_norm:
    rows += [Entry(f"{ours}.{name}_norm.scale", f"{theirs}.{name}_norm.weight") for name in "qk"]
  return rows
