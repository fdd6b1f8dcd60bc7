"""The score job: computes a model's logits and hidden states for given tokens."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill.errors import InputError
from distill.files.replace import replace_file
from distill.jobs.loading import Adapters, Path, adapter_stack, load_model
from distill.types import Capture


def score(
  model: Path,
  *,
  tokens: np.ndarray | Path,
  adapters: Adapters = (),
  hidden: Sequence[int] = (),
  dtype: str = "float32",
) -> dict[str, np.ndarray]:
  """Computes a model's logits, and the outputs of some of its layers.

  Args:
    model: Directory, or org/name[@revision] of the hub.
    tokens: Token ids, int32 [B, T], or a .npy file of them; each row is a separate document.
    adapters: PEFT directories or hub names, merged in this order; or the JSON file of an ordered stack.
    hidden: Indices of the layers, from 0, whose outputs are returned as well.
    dtype: Dtype of the operands of matrix products, 'float32' or 'bfloat16'.

  Returns:
    `logits` float32 [B, T, V] and, for each layer of `hidden`, `hidden_<i>` float32 [B, T, D].

  Raises:
    InputError: The model, an adapter, `tokens` or `hidden` is wrong.
  """
  where = "tokens" if isinstance(tokens, np.ndarray) else os.fspath(tokens)
  ids = _checked(tokens if isinstance(tokens, np.ndarray) else _read(tokens), where=where)
  decoder, params = load_model(model, stack=adapter_stack(adapters))
  config = decoder.config
  if ids.min() < 0 or ids.max() >= config.vocab_size:
    raise InputError(
      f"{where}: holds token ids outside the model's vocabulary; use ids from 0 to {config.vocab_size - 1}"
    )
  config.check_length(ids.shape[1], what=where)
  if not all(0 <= layer < len(config.layers) for layer in hidden):
    raise InputError(
      f"hidden={','.join(map(str, hidden))}: names a layer that the model lacks; use layers from 0 to "
      f"{len(config.layers) - 1}"
    )

  @jax.jit
  def forward(params, tokens):
    output = decoder.apply(
      params,
      tokens=tokens,
      segments=jnp.ones_like(tokens),
      positions=jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
      capture=Capture(layers=tuple(hidden)),
      dtype=jnp.dtype(dtype),
    )
    return output.readout.logits(output.hidden)[..., : config.vocab_size], output.layers

  # Row by row: the logits of all rows together may not fit on the devices.
  rows = [forward(params, row[None]) for row in ids]
  arrays = {"logits": np.concatenate([np.asarray(logits) for logits, _ in rows])}
  for layer in sorted(set(hidden)):
    arrays[f"hidden_{layer}"] = np.concatenate([np.asarray(outputs[layer], np.float32) for _, outputs in rows])
  return arrays


def _read(path: Path) -> np.ndarray:
  try:
    tokens = np.load(path, allow_pickle=False)
  except (OSError, ValueError, EOFError) as error:
    raise InputError(
      f"{path}: cannot be read as a .npy file ({error}); write the token ids as one int32 array of shape [B, T]"
    ) from error
  if not isinstance(tokens, np.ndarray):
    raise InputError(f"{path}: holds several arrays; write the token ids as one int32 array of shape [B, T]")
  return tokens


def _checked(tokens: np.ndarray, *, where: str) -> np.ndarray:
  if tokens.ndim != 2 or tokens.dtype != np.int32 or not tokens.size:
    raise InputError(
      f"{where}: is an array of dtype {tokens.dtype} and shape {list(tokens.shape)}; write the token ids as one int32 "
      "array of shape [B, T], not empty"
    )
  return tokens


def check_writable(out: Path) -> None:
  """Checks that the output file can be written, before the scores are computed.

  Raises:
    InputError: The file's directory is missing or not writable.
  """
  parent = pathlib.Path(out).parent
  if not parent.is_dir() or not os.access(parent, os.W_OK):
    raise InputError(f"out={out}: cannot be written; name a file in a directory that exists and is writable")


def write_scores(scores: dict[str, Any], *, out: Path) -> None:
  """Writes scores atomically as a .npz file."""
  # Given a path, savez would add .npz to a name without it.
  with replace_file(pathlib.Path(out)) as work, work.open("wb") as file:
    np.savez(file, **scores)
