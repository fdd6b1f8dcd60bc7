"""Defines and reads the flags that name a model and its adapters."""

from absl import flags

from distill.errors import InputError
from distill.jobs.loading import Adapters

MODEL = "Model directory, or org/name[@revision] of the hub."


def define(values: flags.FlagValues, *, model: str = "model", help: str = MODEL) -> None:
  """Adds three flags to a command: one that names a model (called --model by default), --adapters, --adapter_stack.

  Args:
    values: Flags of the command, to which the three are added.
    model: Name of the first flag, without dashes.
    help: Help text of the first flag.
  """
  flags.DEFINE_string(model, None, help, required=True, flag_values=values)
  flags.DEFINE_list("adapters", [], "PEFT directories or hub names, merged in this order.", flag_values=values)
  flags.DEFINE_string("adapter_stack", "", "JSON file of an ordered stack of adapters.", flag_values=values)


def adapters(values: flags.FlagValues) -> Adapters:
  """Returns the adapters that --adapters or --adapter_stack names.

  Raises:
    InputError: Both flags are given.
  """
  if values.adapters and values.adapter_stack:
    raise InputError("--adapters and --adapter_stack: both are given; give only one of them")
  return values.adapter_stack or values.adapters
