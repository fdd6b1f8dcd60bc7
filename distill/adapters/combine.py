"""Combines the weight changes of several adapters into one change of the base model.

All methods work on whole weight matrices, never on the LoRA factors A and B. `sum` adds the changes, as merging the
adapters one after another does. `ties` trims each change and elects one sign for every element (Yadav et al. 2023,
2306.01708). `dare` drops elements at random and rescales the rest (Yu et al. 2023, 2311.03099). Each change is first
multiplied by its adapter's weight in the stack. TIES and DARE measure every change from the base, even that of an
adapter which was trained on top of others.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from distill.adapters.edits import Edit, LowRank, Replacement
from distill.adapters.layout import EMBEDDING, Layout, layout
from distill.adapters.merging import add_missing_parameters, apply_stack, edited, fit_config, merge_adapters
from distill.adapters.peft import Adapter
from distill.adapters.peft_writer import joined
from distill.adapters.stack import StackedAdapter
from distill.errors import InputError
from distill.models.config import DecoderConfig
from distill.tree import Params

METHODS = ("sum", "ties", "dare")


def ties(changes: Sequence[Float[np.ndarray, "..."]], *, density: float) -> Float[np.ndarray, "..."]:
  """Merges changes by TIES: trims each change, elects one sign for every element, and averages over that sign.

  The elected sign of an element is the sign of its sum over the trimmed changes. The average is over the changes that
  have this sign there; it is 0 if the sum is 0.

  Args:
    changes: Weighted changes of one parameter.
    density: Fraction of the elements of each change that trimming retains: those of largest magnitude.

  Returns:
    The combined change; its shape is that of each given change.
  """
  trimmed = np.stack([_trim(change, density) for change in changes])
  agree = (np.sign(trimmed) == np.sign(trimmed.sum(axis=0))) & (trimmed != 0)
  return np.where(agree, trimmed, 0).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)


def _trim(change: np.ndarray, density: float) -> np.ndarray:
  count = int(density * change.size)
  order = np.argpartition(np.abs(change), change.size - count, axis=None) if count else np.zeros(0, int)
  trimmed = np.zeros_like(change)
  chosen = order[change.size - count :]
  trimmed.flat[chosen] = change.flat[chosen]
  return trimmed


def dare(changes: Sequence[Float[np.ndarray, "..."]], *, density: float, seed: Sequence[int]) -> np.ndarray:
  """Merges changes by DARE: drops elements with probability 1 - density, rescales the others, and adds the changes.

  Args:
    changes: Weighted changes of one parameter.
    density: Probability that an element is retained; retained elements are divided by it.
    seed: Seed of NumPy's random generator; several integers form one seed.

  Returns:
    The combined change; its shape is that of each given change.
  """
  rng = np.random.default_rng(seed)
  rescaled = [np.where(rng.random(x.shape) < density, x, 0) / np.float32(density) for x in changes]
  return np.sum(rescaled, axis=0)


def low_rank(change: Float[np.ndarray, "I O"], *, rank: int) -> LowRank:
  """Returns factors A and B of the matrix of rank `rank` that is nearest to `change` (truncated SVD).

  Both A and B contain the square root of the singular values.
  """
  u, s, v = np.linalg.svd(change, full_matrices=False)
  root = np.sqrt(s[:rank])
  return LowRank(a=u[:, :rank] * root, b=root[:, None] * v[:rank], scale=1.0)


def combine(
  params: Mapping[str, Any],
  *,
  adapters: Sequence[StackedAdapter],
  config: DecoderConfig,
  method: str = "sum",
  density: float = 1.0,
  seed: int = 0,
) -> tuple[DecoderConfig, Params]:
  """Applies the combined change of several adapters to the base.

  Args:
    params: Canonical parameters of the base.
    adapters: The adapters, in the order of the stack.
    config: Configuration of the base.
    method: 'sum', 'ties' or 'dare'.
    density: Fraction of the elements of each change that TIES or DARE retains; 'sum' ignores it.
    seed: Random seed for DARE.

  Returns:
    The configuration after the change, and all canonical parameters; those that changed are float32.

  Raises:
    InputError: The method is TIES or DARE, and an adapter changes the size of the vocabulary.
  """
  if method == "sum":
    return merge_adapters(params, adapters=adapters, config=config)
  grown, new = add_missing_parameters(params, adapters=adapters, config=config)
  base, changed = {**params, **new}, dict(new)
  for name, changes in _changes(base, adapters):
    if method == "ties":
      change = ties(changes, density=density)
    else:
      change = dare(changes, density=density, seed=[seed, zlib.crc32(name.encode())])
    changed[name] = np.asarray(base[name], np.float32) + change
  grown, changed = fit_config(changed, adapters=adapters, config=grown, tied=config.tie_embeddings)
  return grown, {**params, **changed}


def _changes(base: Params, adapters: Sequence[StackedAdapter]) -> Iterator[tuple[str, list[np.ndarray]]]:
  """Yields (canonical name, changes from the base) of every edited parameter: a change for each adapter that edits it.

  Raises:
    InputError: An adapter changes the size of the vocabulary.
  """
  for name in edited(adapters):
    changes = []
    for entry, adapter in adapters:
      if name not in dict(adapter.edits):
        continue
      after = apply_stack({name: base[name]}, adapters=[(entry, adapter)], only={name})[name]
      if after.shape != np.shape(base[name]):
        raise InputError(
          f"{adapter.path}: this adapter changes the size of the vocabulary, which only --combine=sum supports"
        )
      changes.append(after - np.asarray(base[name], np.float32))
    yield name, changes


def as_adapter(
  params: Mapping[str, Any],
  *,
  adapters: Sequence[StackedAdapter],
  config: DecoderConfig,
  rank: int = 0,
  report: Callable[[str, float], Any] = lambda name, share: None,
  **how: Any,
) -> dict[str, LowRank]:
  """Returns the combined change of several adapters as LoRA factors: exact, or the nearest of a given rank.

  Args:
    params: Canonical parameters of the base.
    adapters: The adapters, in the order of the stack.
    config: Configuration of the base.
    rank: Rank of the factors. 0 asks for the exact change, which has factors only if the method is 'sum' and no
      adapter uses DoRA.
    report: Called for every HF module with its name and the fraction of the norm of its change that the factors
      retain. It is not called for the exact change.
    **how: `method`, `density` and `seed` of `combine`.

  Returns:
    Canonical name -> factors.

  Raises:
    InputError: `rank` is 0 but the change has no exact factors, or an adapter makes a change that LoRA cannot express.
  """
  _, new = add_missing_parameters(params, adapters=adapters, config=config)
  base = {**params, **new}
  adapters = [(entry, _without_base(adapter, base)) for entry, adapter in adapters]
  for _, adapter in adapters:
    if other := next((name for name, edit in adapter.edits if not isinstance(edit, LowRank)), None):
      raise InputError(
        f"{adapter.path}: this adapter changes {other} in a way that LoRA cannot express; write a whole model with "
        "--format=model"
      )
  dora = next((a.path for _, a in adapters if any(getattr(e, "magnitude", None) is not None for _, e in a.edits)), None)
  exact: dict[str, LowRank] = {}
  if how.get("method", "sum") == "sum" and dora is None:
    exact = _concatenated(adapters)
    if not rank:
      return exact
  elif not rank:
    source = (
      f"{dora}: this adapter uses DoRA" if dora else f"--combine={how['method']}: this method gives whole matrices"
    )
    raise InputError(
      f"{source}, which LoRA can only approximate; set a rank with --rank, or write a whole model with --format=model"
    )
  changes = {} if exact else _difference(base, combine(params, adapters=adapters, config=config, **how)[1], adapters)
  return _truncated(layout(config), exact=exact, changes=changes, rank=rank, report=report)


def _truncated(
  known: Layout,
  *,
  exact: Mapping[str, LowRank],
  changes: Params,
  rank: int,
  report: Callable[[str, float], Any],
) -> dict[str, LowRank]:
  """Returns the nearest factors of rank `rank` by canonical name.

  Args:
    known: Layout of the model.
    exact: Factors to truncate, by canonical name; empty if there are none.
    changes: Whole changes to truncate, by canonical name, in place of `exact`.
    rank: Rank of the result.
    report: As in `as_adapter`.
  """
  found: dict[str, LowRank] = {}
  # Kernels of one HF module are truncated together, since they share its factors.
  for theirs in dict.fromkeys(known.theirs(name) for name in exact or changes):
    mine = [entry.ours for entry in known.entries[theirs] if entry.ours in (exact or changes)]
    if exact:
      whole = joined(known, theirs, exact)
      cut, size = _shorter(whole, rank), whole.norm
    else:
      change = known.join(theirs, {name: changes[name] for name in mine})
      cut, size = low_rank(change, rank=rank), float(np.linalg.norm(change))
    report(theirs.removesuffix(".weight"), cut.norm / size if size else 1.0)
    sides = known.columns(theirs, cut.b)
    found |= {name: LowRank(a=cut.a, b=sides[name], scale=1.0) for name in mine}
  return found


def _without_base(adapter: Adapter, base: Mapping[str, Any]) -> Adapter:
  """Returns the adapter without unchanged copies of embedding and head, which PEFT may store next to LoRA factors."""

  def same(name: str, edit: Edit) -> bool:
    under = isinstance(edit, Replacement) and edit.underlies
    return under and np.array_equal(edit.value, np.asarray(base[name], np.float32))  # type: ignore[union-attr]

  return dataclasses.replace(adapter, edits=tuple(one for one in adapter.edits if not same(*one)))


def _difference(base: Params, merged: Params, adapters: Sequence[StackedAdapter]) -> dict[str, np.ndarray]:
  """Returns canonical name -> (merged - base) of every edited matrix.

  A merged model whose head is tied to the embedding stores no head; its transposed embedding is used instead.
  """
  found = {}
  for name in edited(adapters):
    after = merged[name] if name in merged else merged[EMBEDDING].T
    found[name] = np.asarray(after, np.float32) - np.asarray(base[name], np.float32)
  return found


def _concatenated(adapters: Sequence[StackedAdapter]) -> dict[str, LowRank]:
  """Returns canonical name -> factors A and B, concatenated along the rank; A @ B is the sum of all changes."""
  parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
  for entry, adapter in adapters:
    for name, edit in adapter.edits:
      assert isinstance(edit, LowRank), edit
      parts.setdefault(name, []).append((edit.a, np.float32(entry.weight * edit.scale) * edit.b))
  return {
    name: LowRank(a=np.concatenate([a for a, _ in pairs], axis=1), b=np.concatenate([b for _, b in pairs]), scale=1.0)
    for name, pairs in parts.items()
  }


def _shorter(edit: LowRank, rank: int) -> LowRank:
  """Returns factors of lower rank whose product is nearest to that of the factors A and B of `edit`.

  The result is that of `low_rank` for the matrix A @ B, which is never formed.
  """
  (qa, ra), (qb, rb) = np.linalg.qr(edit.a), np.linalg.qr(edit.b.T)
  inner = low_rank(ra @ rb.T, rank=rank)
  return LowRank(a=qa @ inner.a, b=inner.b @ qb.T, scale=1.0)
