"""Merges the adapters of a stack into their base model."""

import dataclasses
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from distill.adapters.edits import Edit, LowRank, TokenRows, apply_edit
from distill.adapters.layout import EMBEDDING, HEAD, with_bias
from distill.adapters.stack import Stack, StackedAdapter, read_adapters
from distill.checkpoints import hf_config
from distill.errors import InputError
from distill.files.tensors import finite
from distill.models.config import DecoderConfig
from distill.tree import Params


def merge(params: Mapping[str, Any], *, stack: Stack, config: DecoderConfig) -> tuple[DecoderConfig, Params]:
  """Reads the adapters of a stack and merges them into a base, in float32 and in the order of the stack.

  Args:
    params: Canonical parameters of the base.
    stack: The stack.
    config: Configuration of the base.

  Returns:
    The configuration and all canonical parameters. The configuration changes if an adapter unties the head, changes the
    number of tokens or adds biases. Parameters that no adapter changes keep their dtype.

  Raises:
    InputError: An adapter cannot be read or belongs to another model.
  """
  return merge_adapters(params, adapters=read_adapters(stack, config=config), config=config)


def merge_adapters(
  params: Mapping[str, Any], *, adapters: Sequence[StackedAdapter], config: DecoderConfig
) -> tuple[DecoderConfig, Params]:
  """Merges adapters into a base, as `merge` does, but takes adapters that have already been read.

  Args:
    params: Canonical parameters of the base.
    adapters: The adapters, in the order of the stack.
    config: Configuration of the base.

  Returns:
    The configuration after merging and all canonical parameters, as `merge` returns them.

  Raises:
    InputError: An adapter makes a parameter infinite, or the adapters give a parameter, or embedding and head, sizes
      that do not fit together.
  """
  grown, new = add_missing_parameters(params, adapters=adapters, config=config)
  changed = new | apply_stack({**params, **new}, adapters=adapters)
  grown, changed = fit_config(changed, adapters=adapters, config=grown, tied=config.tie_embeddings)
  return grown, {**params, **changed}


def edited(adapters: Sequence[StackedAdapter]) -> dict[str, list[Edit]]:
  """Returns canonical name -> edits of that parameter, in stack order, for all that the adapters edit."""
  found: dict[str, list[Edit]] = {}
  for _, adapter in adapters:
    for name, edit in adapter.edits:
      found.setdefault(name, []).append(edit)
  return found


def add_missing_parameters(
  params: Mapping[str, Any], *, adapters: Sequence[StackedAdapter], config: DecoderConfig
) -> tuple[DecoderConfig, Params]:
  """Creates the parameters that adapters edit and the base lacks: zero biases, and a separate head if the base ties it.

  A tied head is untied because adapters are trained on the embedding or on the head, not on both. (PEFT's
  `merge_and_unload` keeps head and embedding tied, and so changes both.)

  Args:
    params: Canonical parameters of the base, of which only the embedding is read.
    adapters: The adapters, in the order of the stack.
    config: Configuration of the base.

  Returns:
    (configuration of the base together with the new parameters, the new parameters alone by canonical name).
  """
  names = set(edited(adapters))
  grown, new = config, dict[str, Any]()
  if config.tie_embeddings and names & {EMBEDDING, HEAD}:
    grown = dataclasses.replace(grown, tie_embeddings=False)
    new[HEAD] = np.asarray(params[EMBEDDING]).T
  missing = sorted(names - set(params) - set(new))
  for name in missing:
    grown = with_bias(grown, name)
  if missing:
    shapes = hf_config.shapes(grown)
    new |= {name: np.zeros(shapes[name], np.float32) for name in set(shapes) - set(params) - set(new)}
  return grown, new


def fit_config(
  changed: Params, *, adapters: Sequence[StackedAdapter], config: DecoderConfig, tied: bool
) -> tuple[DecoderConfig, Params]:
  """Sets `vocab_size` to the number of tokens of the merged embedding and head; ties a head that equals the embedding.

  Args:
    changed: All parameters that differ from the base.
    adapters: The adapters, for error messages.
    config: The configuration that `add_missing_parameters` returned.
    tied: True if the base ties its head, which may then be tied again.

  Returns:
    The configuration with the new number of tokens, tied again if embedding and head are equal, and `changed` without a
    head that is tied again.

  Raises:
    InputError: Embedding and head have different numbers of tokens.
  """
  sizes = [changed[name].shape[axis] for axis, name in enumerate((EMBEDDING, HEAD)) if name in changed]
  if len(set(sizes if len(sizes) == 2 else [*sizes, config.vocab_size])) > 1:
    paths = ", ".join(str(adapter.path) for _, adapter in adapters)
    raise InputError(
      f"{paths}: an adapter changes the number of tokens of only one of embedding and head (to {sizes}, from "
      f"{config.vocab_size}); save both embedding and head in that adapter"
    )
  if sizes:
    config = dataclasses.replace(config, vocab_size=sizes[0])
  if tied and EMBEDDING in changed and HEAD in changed and np.array_equal(changed[EMBEDDING], changed[HEAD].T):
    config = dataclasses.replace(config, tie_embeddings=True)
    del changed[HEAD]
  return config, changed


def apply_stack(
  params: Mapping[str, Any], *, adapters: Sequence[StackedAdapter], only: Collection[str] | None = None
) -> Params:
  """Returns canonical name -> parameter after all edits, for the edited parameters only; `params` is not changed.

  Args:
    params: Canonical parameters; all that are edited must be present.
    adapters: The adapters, in the order of the stack.
    only: Names of the parameters to edit; by default all that the adapters edit.

  Raises:
    InputError: An adapter makes a parameter infinite, or does not fit the size that earlier adapters gave a parameter.
  """
  names = set(edited(adapters) if only is None else only)
  current = {name: params[name] for name in names}
  trained_on = dict(current)
  for entry, adapter in adapters:
    if entry.mode == "sequential":
      trained_on = dict(current)
    for name, edit in adapter.edits:
      if name not in names:
        continue
      current[name] = _applied(edit, current[name], trained_on[name], entry, adapter, name)
      if getattr(edit, "underlies", False):
        trained_on[name] = apply_edit(edit, trained_on[name], trained_on=trained_on[name], weight=entry.weight)
  return current


def _applied(edit, current, trained_on, entry, adapter, name) -> np.ndarray:
  if isinstance(edit, LowRank) and current.shape != (edit.a.shape[0], edit.b.shape[1]):
    raise InputError(
      f"{adapter.path}: the adapter expects {name} with shape {(edit.a.shape[0], edit.b.shape[1])}, but earlier "
      f"adapters of the stack gave it shape {current.shape}; reorder the stack"
    )
  if isinstance(edit, TokenRows) and edit.indices.size and edit.indices.max() >= current.shape[edit.axis]:
    raise InputError(
      f"{adapter.path}: the adapter changes token {edit.indices.max()}, but {name} has only "
      f"{current.shape[edit.axis]} tokens; put it after the adapter that adds the token"
    )
  if trained_on.shape != current.shape:
    trained_on = current  # A co-active adapter has changed the number of tokens.
  with np.errstate(over="ignore", invalid="ignore"):
    after = apply_edit(edit, current, trained_on=trained_on, weight=entry.weight)
  check_finite(after, name=name, paths=[adapter.path])
  return after


def check_finite(value: np.ndarray, *, name: str, paths: Sequence[pathlib.Path]) -> None:
  """Checks that adapters have not made a parameter infinite or NaN.

  Args:
    value: The parameter after the adapters are applied.
    name: Canonical name of the parameter.
    paths: Directories of the adapters, for the error message.

  Raises:
    InputError: `value` holds infinities or NaN.
  """
  if not finite(value):
    directories = ", ".join(map(str, paths))
    raise InputError(
      f"{directories}: {name} becomes infinite; the LoRA factors or lora_alpha are damaged, so leave this adapter out"
    )
