"""distill score: logits and hidden states of a model for given tokens."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from distill.cli import models
from distill.cli.parsing import parse
from distill.errors import InputError
from distill.files.replace import replace_file
from distill.types import Capture

FLAGS = flags.FlagValues()
models.define(FLAGS)
_TOKENS = flags.DEFINE_string("tokens", None, ".npy of int32 token ids [B, T].", required=True, flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", None, ".npz to write.", required=True, flag_values=FLAGS)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of the operands.", flag_values=FLAGS)
_HIDDEN = flags.DEFINE_list("hidden", [], "Layers, from 0, whose outputs are written as well.", flag_values=FLAGS)


def main(arguments: Sequence[str]) -> int:
  """Writes `logits` float32 [B,T,V] and, per layer asked for, `hidden_<i>` float32 [B,T,D]."""
  parse(FLAGS, arguments)
  tokens = _read(pathlib.Path(_TOKENS.value))
  out = pathlib.Path(_OUT.value)
  if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
    raise InputError(f"{out}: cannot be written; --out needs a directory that exists and is writable")
  decoder, params = models.load(FLAGS.model, stack=models.stack(FLAGS))
  config = decoder.config
  if tokens.size and (tokens.min() < 0 or tokens.max() >= config.vocab_size):
    raise InputError(f"{_TOKENS.value}: token ids must be from 0 to {config.vocab_size - 1}, the model's vocabulary")
  decoder.config.check_length(tokens.shape[1], what=_TOKENS.value)
  layers = _layers(len(config.layers))

  @jax.jit
  def score(params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    output = decoder.apply(
      params,
      tokens=tokens,
      segments=jnp.ones_like(tokens),
      positions=positions,
      capture=Capture(layers=tuple(layers)),
      dtype=jnp.dtype(_DTYPE.value),
    )
    return output.readout.logits(output.hidden)[..., : config.vocab_size], output.layers

  parts = [score(params, row[None]) for row in tokens]
  logits = np.concatenate([np.asarray(part[0]) for part in parts])
  arrays: dict[str, Any] = {"logits": logits}
  for layer in sorted(set(layers)):
    arrays[f"hidden_{layer}"] = np.concatenate([np.asarray(part[1][layer], np.float32) for part in parts])
  # Given a path, savez would add .npz to a name without it.
  with replace_file(out) as work, work.open("wb") as file:
    np.savez(file, **arrays)
  return 0


def _read(path: pathlib.Path) -> np.ndarray:
  try:
    tokens = np.load(path, allow_pickle=False)
  except (OSError, ValueError, EOFError) as error:
    raise InputError(f"{path}: cannot be read as .npy ({error}); --tokens needs an int32 array [B, T]") from error
  if not isinstance(tokens, np.ndarray) or tokens.ndim != 2 or tokens.dtype != np.int32 or not tokens.size:
    found = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, np.ndarray) else "an archive"
    raise InputError(f"{path}: {found}; --tokens needs an int32 array [B, T]")
  return tokens


def _layers(count: int) -> list[int]:
  try:
    layers = [int(text) for text in _HIDDEN.value]
  except ValueError as error:
    raise InputError(f"--hidden={','.join(_HIDDEN.value)}: give layer numbers such as 0,2") from error
  if any(not 0 <= layer < count for layer in layers):
    raise InputError(f"--hidden={','.join(_HIDDEN.value)}: the model has layers 0 to {count - 1}")
  return layers
