"""Maps each Hugging Face (HF) tensor, by its name in adapters, to the decoder's own (canonical) parameters in it."""

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from distill.checkpoints import hf_config
from distill.checkpoints.name_table import Part, TensorEntry, to_ours
from distill.models.config import DecoderConfig

EMBEDDING, HEAD = "embed.table", "head.kernel"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """The name table of a model, looked up by HF tensor. A tied head counts as a separate tensor.

  In the methods `theirs` is the name of an HF tensor. Canonical parameters are those of the project's own decoder: they
  have its names, such as `embed.table`, and kernels are [I, O].

  Attributes:
    config: Configuration of the model.
    entries: Name of an HF tensor -> the parameters, or pieces of parameters, that the tensor holds.
    shapes: Shape of every canonical parameter.
  """

  config: DecoderConfig
  entries: Mapping[str, tuple[TensorEntry, ...]]
  shapes: Mapping[str, tuple[int, ...]]

  def shape(self, theirs: str) -> tuple[int, ...]:
    """Returns the shape of the HF tensor `theirs`, converted to the layout of canonical parameters (kernels [I, O])."""
    first, *others = (self.shapes[entry.ours] for entry in self.entries[theirs])
    if self.entries[theirs][0].expert is not None:
      return first[1:]
    return (*first[:-1], first[-1] + sum(shape[-1] for shape in others))

  def pieces(self, theirs: str, value: np.ndarray) -> dict[str, np.ndarray]:
    """Splits `value`, the array of the HF tensor `theirs`, into the canonical parameters that the tensor holds.

    Returns canonical name -> array in the layout of canonical parameters: the whole parameter or, of stacked experts,
    the expert that the tensor holds.
    """
    return {entry.ours: to_ours(value, entry=entry) for entry in self.entries[theirs]}

  def columns(self, theirs: str, value: np.ndarray) -> dict[str, np.ndarray]:
    """Splits an array's columns among the parameters that an HF tensor holds; returns canonical name -> columns.

    Args:
      theirs: Name of the HF tensor, which may hold several parameters (fused projections).
      value: An array whose last axis is the output axis of this tensor, such as LoRA's B [R, O] or a bias [O].
    """
    return {entry.ours: value if entry.part is None else entry.part.take(value) for entry in self.entries[theirs]}

  def join(self, theirs: str, pieces: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns one array for the HF tensor `theirs`, joined from pieces: the inverse of the method `columns`.

    Args:
      theirs: Name of the HF tensor.
      pieces: Canonical name -> columns, as `columns` returns them. At least one; the missing ones become zero.
    """
    first = next(iter(pieces.values()))
    whole = np.zeros((*first.shape[:-1], self.shape(theirs)[-1]), np.float32)
    for entry in self.entries[theirs]:
      if entry.ours in pieces:
        (entry.part or Part(0, whole.shape[-1])).put(whole, pieces[entry.ours])
    return whole

  def theirs(self, ours: str) -> str:
    """Returns the name of the HF tensor that holds a canonical parameter."""
    return next(name for name, entries in self.entries.items() if any(entry.ours == ours for entry in entries))


@functools.lru_cache(maxsize=4)
def layout(config: DecoderConfig) -> Layout:
  """Returns the `Layout`, the map between HF tensors and canonical parameters, of models with this configuration."""
  untied = dataclasses.replace(config, tie_embeddings=False)
  entries: dict[str, tuple[TensorEntry, ...]] = {}
  for entry in hf_config.name_table(untied):
    # transformers 5: Mixtral's module is `mlp` in memory, where PEFT takes names from, but not on disk.
    name = entry.theirs.replace(".block_sparse_moe.", ".mlp.")
    entries[name] = (*entries.get(name, ()), entry)
  entries |= {found[0].theirs: found for found in entries.values() if len(found) == 1}
  return Layout(config=config, entries=entries, shapes=hf_config.shapes(untied))


def with_bias(config: DecoderConfig, name: str) -> DecoderConfig:
  """Returns the configuration with the bias `name` (`layers.{i}.….bias`), or unchanged if the layer cannot have it.

  All other projections of that mixer or MLP get a bias too, because its options cannot add a single one. So do the
  layers whose mixer or MLP has an equal configuration.
  """
  parts = name.split(".")
  if len(parts) < 3 or parts[0] != "layers" or parts[2] not in ("mixer", "mlp"):
    return config
  part = parts[2]
  kind = getattr(config.layers[int(parts[1])], part)
  fields = {field.name for field in dataclasses.fields(kind)} & {"use_bias", "use_out_bias"}
  changed = dataclasses.replace(kind, **dict.fromkeys(fields, True))
  layers = tuple(
    dataclasses.replace(layer, **{part: changed}) if getattr(layer, part) == kind else layer for layer in config.layers
  )
  return dataclasses.replace(config, layers=layers)
