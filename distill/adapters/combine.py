"""Combines the weight changes of several adapters into one. It combines whole matrices, never the factors A and B.

`sum` adds the changes, which is what the stack itself does. `ties` trims each change and elects a sign for every number
(Yadav et al. 2023, 2306.01708). `dare` drops numbers at random and rescales the rest (Yu et al. 2023, 2311.03099).
The weights of the stack scale the changes first. TIES and DARE measure every change from the base, whatever its mode.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from distill.adapters.edits import Edit, LowRank, Replacement
from distill.adapters.layout import EMBEDDING, layout
from distill.adapters.peft import Adapter, joined
from distill.adapters.stack import StackedAdapter, apply, edited, merge_adapters, prepare, settle
from distill.errors import InputError
from distill.models.config import DecoderConfig
from distill.tree import Params

METHODS = ("sum", "ties", "dare")


def ties(changes: Sequence[Float[np.ndarray, "..."]], *, density: float) -> Float[np.ndarray, "..."]:
  """Merges changes by TIES: each element is the mean of the trimmed changes whose sign is that of their sum.

  Args:
    changes: Weighted changes of one parameter.
    density: Fraction of the elements of each change that trimming retains: those of largest magnitude.

  Returns:
    The combined change, of the same shape.
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
  """Merges changes by DARE: sums them after elements are dropped with probability 1 - density, the rest rescaled.

  Args:
    changes: Weighted changes of one parameter.
    density: Probability that an element is retained; retained elements are divided by it.
    seed: Random seed.

  Returns:
    The combined change, of the same shape.
  """
  rng = np.random.default_rng(seed)
  rescaled = [np.where(rng.random(x.shape) < density, x, 0) / np.float32(density) for x in changes]
  return np.sum(rescaled, axis=0)


def low_rank(change: Float[np.ndarray, "I O"], *, rank: int) -> LowRank:
  """Returns factors of the nearest matrix of rank `rank` (truncated SVD), each scaled by √(singular values)."""
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
    adapters: The stack.
    config: Configuration of the base.
    method: 'sum', 'ties' or 'dare'.
    density: Fraction of each change that TIES or DARE retains.
    seed: Random seed for DARE.

  Returns:
    The configuration and all canonical parameters; those that changed are float32.

  Raises:
    InputError: TIES or DARE with an adapter that changes the number of tokens.
  """
  if method == "sum":
    return merge_adapters(params, adapters=adapters, config=config)
  grown, new = prepare(params, adapters=adapters, config=config)
  base, changed = {**params, **new}, dict(new)
  for name, changes in _changes(base, adapters):
    if method == "ties":
      change = ties(changes, density=density)
    else:
      change = dare(changes, density=density, seed=[seed, zlib.crc32(name.encode())])
    changed[name] = np.asarray(base[name], np.float32) + change
  grown, changed = settle(changed, adapters=adapters, config=grown, tied=config.tie_embeddings)
  return grown, {**params, **changed}


def _changes(base: Params, adapters: Sequence[StackedAdapter]) -> Iterator[tuple[str, list[np.ndarray]]]:
  """Yields every edited parameter with the change from the base of each adapter that edits it."""
  for name in edited(adapters):
    changes = []
    for one in adapters:
      if name not in dict(one[1].edits):
        continue
      after = apply({name: base[name]}, adapters=[one], only={name})[name]
      if after.shape != np.shape(base[name]):
        raise InputError(f"{one[1].path}: changes the number of tokens, which only --combine=sum supports")
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
  """Returns the combined change as plain LoRA: exact, from the adapters' factors, or the nearest change of `rank`.

  Args:
    params: Canonical parameters of the base.
    adapters: The stack.
    config: Configuration of the base.
    rank: 0 for the exact change, which only a sum of plain LoRA has.
    report: Called for every HF module with its name and the fraction of its change's norm that the rank retains.
    **how: `method`, `density` and `seed` of `combine`.

  Returns:
    Canonical name -> factors.

  Raises:
    InputError: The change has no low rank and no rank was given, or changes a parameter that LoRA cannot change.
  """
  _, new = prepare(params, adapters=adapters, config=config)
  base = {**params, **new}
  adapters = [(entry, _without_base(adapter, base)) for entry, adapter in adapters]
  for _, adapter in adapters:
    if other := next((name for name, edit in adapter.edits if not isinstance(edit, LowRank)), None):
      raise InputError(f"{adapter.path}: changes {other} in a way that LoRA cannot express; use --format=model")
  dora = next((a.path for _, a in adapters if any(getattr(e, "magnitude", None) is not None for _, e in a.edits)), None)
  exact: dict[str, LowRank] = {}
  if how.get("method", "sum") == "sum" and dora is None:
    exact = _concatenated(adapters)
    if not rank:
      return exact
  elif not rank:
    what = f"{dora}: is DoRA" if dora else f"--combine={how['method']}: gives whole matrices"
    raise InputError(f"{what}, which LoRA can only approximate; add --rank, or use --format=model")
  changes = {} if exact else _difference(base, combine(params, adapters=adapters, config=config, **how)[1], adapters)
  known, found = layout(config), dict[str, LowRank]()
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
  """Returns the adapter without unchanged copies of embedding and head, which PEFT stores beside their factors."""

  def same(name: str, edit: Edit) -> bool:
    under = isinstance(edit, Replacement) and edit.underlies
    return under and np.array_equal(edit.value, np.asarray(base[name], np.float32))  # type: ignore[union-attr]

  return dataclasses.replace(adapter, edits=tuple(one for one in adapter.edits if not same(*one)))


def _difference(base: Params, merged: Params, adapters: Sequence[StackedAdapter]) -> dict[str, np.ndarray]:
  """Returns the change of every edited matrix. A head that is tied again has the embedding's values."""
  found = {}
  for name in edited(adapters):
    after = merged[name] if name in merged else merged[EMBEDDING].T
    found[name] = np.asarray(after, np.float32) - np.asarray(base[name], np.float32)
  return found


def _concatenated(adapters: Sequence[StackedAdapter]) -> dict[str, LowRank]:
  """Returns the adapters' factors, concatenated so that their product is the sum of the adapters' products."""
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
  """Returns `low_rank` of the product A @ B at `rank`, computed from factors, without forming the product."""
  (qa, ra), (qb, rb) = np.linalg.qr(edit.a), np.linalg.qr(edit.b.T)
  inner = low_rank(ra @ rb.T, rank=rank)
  return LowRank(a=qa @ inner.a, b=inner.b @ qb.T, scale=1.0)
