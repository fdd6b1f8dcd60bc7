"""Flags that name a model and its adapters, shared by the commands that load one."""

import pathlib

from absl import flags

from distill.adapters.loading import load_merged
from distill.adapters.stack import Stack, read_adapters, read_stack, stack_of
from distill.checkpoints import hf_config
from distill.checkpoints.hub import locate
from distill.errors import InputError
from distill.models.decoder import Decoder
from distill.parallel.mesh import make_mesh
from distill.parallel.processes import fail_together
from distill.tree import Params


def define(
  values: flags.FlagValues, *, model: str = "model", what: str = "Model directory, or org/name[@revision] of the hub."
) -> None:
  """Adds the model's flag, --adapters and --adapter_stack."""
  flags.DEFINE_string(model, None, what, required=True, flag_values=values)
  flags.DEFINE_list("adapters", [], "PEFT directories or hub names, merged in this order.", flag_values=values)
  flags.DEFINE_string("adapter_stack", "", "JSON file of an ordered stack of adapters.", flag_values=values)


def stack(values: flags.FlagValues) -> Stack:
  """The stack that --adapters or --adapter_stack gives; empty for neither.

  Raises:
    InputError: Both are given, or the stack's file is wrong.
  """
  if values.adapters and values.adapter_stack:
    raise InputError("--adapters and --adapter_stack: both given; give one of them")
  with fail_together("--adapters and --adapter_stack"):
    return read_stack(pathlib.Path(values.adapter_stack)) if values.adapter_stack else stack_of(values.adapters)


def load(model: str, *, stack: Stack = ()) -> tuple[Decoder, Params]:
  """A decoder and its stacked float32 parameters over all devices, adapters merged."""
  with fail_together(model):
    directory = locate(model)
    adapters = read_adapters(stack, config=hf_config.read_config(directory))
  config, params = load_merged(directory, adapters=adapters, mesh=make_mesh((1, -1, 1)))
  return Decoder(config), params
