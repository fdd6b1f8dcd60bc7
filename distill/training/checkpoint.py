"""Atomic checkpoints; each array's digest is verified on restore."""

import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import Array, UInt32

from distill.errors import InputError
from distill.tree import Params

_UINTS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def flatten_state(state: Any) -> Params:
  """Returns the arrays of a pytree as a flat dict from path to array; a path joins keys by `/`, such as `trained/x`."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(state)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten_state(like: Any, flat: Mapping[str, Any]) -> Any:
  """Returns a pytree of the structure of `like` with the arrays of `flat`, a result of `flatten_state`."""
  paths, structure = jax.tree_util.tree_flatten_with_path(like)
  names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
  return jax.tree_util.tree_unflatten(structure, [flat[name] for name in names])


def _digest(x: Array) -> UInt32[Array, " 2"]:
  """Computes two 32-bit sums of an array's bits, each element weighted by an odd function of its index.

  Integer sums do not depend on the order, so the digest is the same on every mesh. A flipped bit changes both sums.
  """
  x = x if x.dtype != jnp.bool_ else x.astype(jnp.uint8)
  bits = jax.lax.bitcast_convert_type(x, _UINTS[x.dtype.itemsize]).astype(jnp.uint32).reshape(-1)
  index = jnp.arange(bits.size, dtype=jnp.uint32)
  mixed = (index ^ (index >> 15)) * jnp.uint32(2654435761)
  weights = jnp.stack([2 * index + 1, (mixed ^ (mixed >> 13)) | 1])
  return jnp.sum(bits[None, :] * weights, axis=1, dtype=jnp.uint32)


@jax.jit
def _digests(arrays: Params) -> dict[str, Array]:
  return {name: _digest(x) for name, x in arrays.items()}


def digests(arrays: Params) -> dict[str, str]:
  """Returns each array's digest by its name: a string of dtype, shape and hexadecimal digits."""
  sums = jax.device_get(_digests(arrays))
  return {name: f"{arrays[name].dtype}{list(arrays[name].shape)}:{a:08x}{b:08x}" for name, (a, b) in sums.items()}


def notes_path(directory: pathlib.Path) -> pathlib.Path:
  """Returns the path of the notes in a checkpoint directory: JSON {"digests": {name: digest}, "extra": {…}}."""
  return pathlib.Path(directory) / "notes" / "metadata"


class Checkpoints:
  """The numbered checkpoints of a run, saved in the background; only the last two are retained.

  Args:
    directory: Directory of the checkpoints; it is created if missing.

  Raises:
    InputError: The directory cannot be written.
  """

  def __init__(self, directory: pathlib.Path):
    self.directory = pathlib.Path(directory).absolute()
    try:
      self.directory.mkdir(parents=True, exist_ok=True)
      options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
      self._manager = ocp.CheckpointManager(self.directory, options=options)
    except OSError as error:
      raise InputError(
        f"{directory}: checkpoints cannot be written here ({error.strerror}); name another workdir"
      ) from error

  def save(self, step: int, *, arrays: Params, extra: Mapping[str, Any]) -> None:
    """Starts saving a checkpoint in the background, unless that step has one already.

    Args:
      step: Number of training steps done, which is the checkpoint's number.
      arrays: Arrays by name, from `flatten_state`; they may be donated once this returns.
      extra: JSON values to store with the arrays.
    """
    if step in self._manager.all_steps():
      return
    notes = {"digests": digests(arrays), "extra": dict(extra)}
    self._manager.save(
      step, args=ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), notes=ocp.args.JsonSave(notes))
    )

  def restore(
    self, abstract: Callable[[Mapping[str, Any]], Params], *, log: Callable[[str], None] | None = None
  ) -> tuple[Params, dict[str, Any]] | None:
    """Returns (arrays, extra) of the newest undamaged checkpoint, as `save` got them; None without checkpoints.

    Args:
      abstract: Function that returns the shapes, dtypes and shardings of a checkpoint's arrays from its `extra`, the
        JSON values that were saved with them.
      log: Called with one line of text for each damaged checkpoint; None prints the line to standard error.

    Raises:
      InputError: There are checkpoints, and all of them are damaged.
    """
    log = log or (lambda line: print(line, file=sys.stderr, flush=True))
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step in steps:
      try:
        return self._restore(step, abstract)
      except InputError as error:
        log(f"checkpoint {step} is damaged ({error}); trying the checkpoint before it")
    if steps:
      raise InputError(
        f"{self.directory}: every checkpoint is damaged; restore one from a copy, or delete the directory to start anew"
      )
    return None

  def _restore(self, step, abstract) -> tuple[Params, dict[str, Any]]:
    try:
      notes = self._manager.restore(step, args=ocp.args.Composite(notes=ocp.args.JsonRestore()))["notes"]
      wanted, expected = abstract(notes["extra"]), notes["digests"]
      if set(wanted) != set(expected):
        name = min(set(wanted) ^ set(expected))
        raise InputError(f"the array {name} is only in the checkpoint or only in the state that this run expects")
      arrays = self._manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(wanted)))["arrays"]
    except InputError:
      raise
    except Exception as error:
      reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
      raise InputError(f"it cannot be read ({reason})") from error
    found = digests(arrays)
    wrong = sorted(name for name in expected if found[name] != expected[name])
    if wrong:
      raise InputError(
        f"the digests of {len(wrong)} arrays, such as {wrong[0]}, differ from those recorded when they were saved"
      )
    return arrays, notes["extra"]

  def close(self) -> None:
    """Waits until all checkpoints are on disk, and closes Orbax's checkpoint manager; no other method may follow."""
    self._manager.wait_until_finished()
    self._manager.close()
