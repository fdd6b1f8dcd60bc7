"""Flags that name a model and its adapters, shared by the commands that load one."""

import pathlib

import jax
import numpy as np
from absl import flags

from distill.adapters.stack import Stack, merge, read_stack, stack_of
from distill.errors import InputError
from distill.models import hf
from distill.models.config import DecoderConfig
from distill.models.decoder import Decoder
from distill.tree import Params


def define(values: flags.FlagValues, *, model: str = "model", what: str = "Model directory.") -> None:
  """Adds the model's flag, --adapters and --adapter_stack."""
  flags.DEFINE_string(model, None, what, required=True, flag_values=values)
  flags.DEFINE_list("adapters", [], "PEFT directories, merged in this order.", flag_values=values)
  flags.DEFINE_string("adapter_stack", "", "JSON file of an ordered stack of adapters.", flag_values=values)


def stack(values: flags.FlagValues) -> Stack:
  """The stack that --adapters or --adapter_stack gives; empty for neither.

  Raises:
    InputError: Both are given, or the stack's file is wrong.
  """
  if values.adapters and values.adapter_stack:
    raise InputError("--adapters and --adapter_stack: give one of them")
  if values.adapter_stack:
    return read_stack(pathlib.Path(values.adapter_stack))
  return stack_of(values.adapters)


def load(directory: str, *, stack: Stack = ()) -> tuple[Decoder, Params]:
  """A decoder and its stacked float32 parameters on the default device, adapters merged."""
  config, params = hf.load(pathlib.Path(directory))
  return place(*merge(params, stack=stack, config=config))


def place(config: DecoderConfig, canonical: Params) -> tuple[Decoder, Params]:
  """A decoder and its stacked float32 parameters on the default device."""
  decoder = Decoder(config)
  stacked = decoder.stack({name: np.asarray(x, np.float32) for name, x in canonical.items()})
  return decoder, jax.device_put(stacked)
