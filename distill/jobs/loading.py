"""Loads models with their adapters merged, for jobs that run them without training."""

import os
import pathlib
from collections.abc import Sequence

from distill.adapters.loading import load_merged
from distill.adapters.stack import Stack, read_adapters, read_stack, stack_of
from distill.checkpoints import hf_config
from distill.checkpoints.hub import locate
from distill.models.decoder import Decoder
from distill.parallel.mesh import MeshConfig, make_mesh
from distill.parallel.processes import fail_together
from distill.tree import Params

Path = str | os.PathLike[str]
# PEFT directories or hub names, merged in this order; or the JSON file of an ordered stack.
Adapters = Sequence[Path] | Path


def adapter_stack(adapters: Adapters) -> Stack:
  """Returns the adapter stack that a list of directories or a JSON file describes.

  Raises:
    InputError: The file is missing or wrong, or a hub name cannot be found.
  """
  with fail_together("adapters"):
    if isinstance(adapters, str | os.PathLike):
      return read_stack(pathlib.Path(adapters))
    return stack_of(list(adapters))


def load_model(model: Path, *, stack: Stack = ()) -> tuple[Decoder, Params]:
  """Loads a model onto all devices, with adapters merged into it.

  Args:
    model: Directory, or org/name[@revision] of the hub.
    stack: Adapters to merge into the model.

  Returns:
    The decoder and its stacked float32 parameters.

  Raises:
    InputError: The model or an adapter cannot be read, or they do not fit each other.
  """
  with fail_together(os.fspath(model)):
    directory = locate(model)
    adapters = read_adapters(stack, config=hf_config.read_config(directory))
  config, params = load_merged(directory, adapters=adapters, mesh=make_mesh(MeshConfig(data=1, fsdp=-1)))
  return Decoder(config), params
