"""One change of weights out of several adapters', always of the whole matrices, never of A and B apart.

`sum` adds the changes up (a stack as it stands), `ties` trims and elects a sign for every number (Yadav et al. 2023,
2306.01708), `dare` drops numbers at random and rescales the rest (Yu et al. 2023, 2311.03099). The weights of a stack
multiply its changes first. TIES and DARE take every adapter's change from the base, whatever its mode.
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
  """The mean, number by number, of the trimmed changes that agree in sign with their total.

  Args:
    changes: Of one parameter, weighted.
    density: Share of each that is kept, its largest numbers.
  """
  trimmed = np.stack([_trim(change, density) for change in changes])
  agree = (np.sign(trimmed) == np.sign(trimmed.sum(axis=0))) & (trimmed != 0)
  return np.where(agree, trimmed, 0).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)


def _trim(change: np.ndarray, density: float) -> np.ndarray:
  kept = int(density * change.size)
  order = np.argpartition(np.abs(change), change.size - kept, axis=None) if kept else np.zeros(0, int)
  trimmed = np.zeros_like(change)
  chosen = order[change.size - kept :]
  trimmed.flat[chosen] = change.flat[chosen]
  return trimmed


def dare(changes: Sequence[Float[np.ndarray, "..."]], *, density: float, seed: Sequence[int]) -> np.ndarray:
  """The sum of changes of which each number is kept with probability `density`, and divided by it."""
  rng = np.random.default_rng(seed)
  kept = [np.where(rng.random(x.shape) < density, x, 0) / np.float32(density) for x in changes]
  return np.sum(kept, axis=0)


def low_rank(change: Float[np.ndarray, "I O"], *, rank: int) -> LowRank:
  """The nearest matrix of a rank in the Frobenius norm, as factors that share its singular values evenly."""
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
  """Architecture and canonical parameters of the base with the combined change, in float32 where it changed.

  Raises:
    InputError: TIES or DARE of adapters that bring another number of tokens.
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
  """Every edited parameter with what each adapter that edits it, alone on the base, makes of it."""
  for name in edited(adapters):
    changes = []
    for one in adapters:
      if name not in dict(one[1].edits):
        continue
      after = apply({name: base[name]}, adapters=[one], only={name})[name]
      if after.shape != np.shape(base[name]):
        raise InputError(f"{one[1].path}: brings another number of tokens, which only --combine=sum can take in")
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
  """The combined change as plain LoRA: exactly, from the adapters' own factors, or the nearest of a rank.

  Args:
    params: Canonical parameters of the base.
    adapters: The stack.
    config: Architecture of the base.
    rank: 0 for exactly, which only a sum of plain LoRA can be.
    report: Told of every HF module the share of its change's norm that the rank keeps, from 0 to 1.
    how: `method`, `density` and `seed` of `combine`.

  Raises:
    InputError: The change has no low rank and none was given, or is of something that LoRA cannot change.
  """
  _, new = prepare(params, adapters=adapters, config=config)
  base = {**params, **new}
  adapters = [(entry, _without_base(adapter, base)) for entry, adapter in adapters]
  for _, adapter in adapters:
    if other := next((name for name, edit in adapter.edits if not isinstance(edit, LowRank)), None):
      raise InputError(f"{adapter.path}: changes {other} by more than LoRA can; use --format=model")
  dora = next((a.path for _, a in adapters if any(getattr(e, "magnitude", None) is not None for _, e in a.edits)), None)
  exact: dict[str, LowRank] = {}
  if how.get("method", "sum") == "sum" and dora is None:
    exact = _concatenated(adapters)
    if not rank:
      return exact
  elif not rank:
    what = f"{dora}: is DoRA" if dora else f"--combine={how['method']}: gives whole matrices"
    raise InputError(f"{what}, which LoRA holds only to a rank; add --rank, or use --format=model")
  changes = {} if exact else _difference(base, combine(params, adapters=adapters, config=config, **how)[1], adapters)
  known, found = layout(config), dict[str, LowRank]()
  # Kernels of one HF module are cut together, since they share its factors.
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
  """The adapter without the embedding and head that PEFT stores beside factors of theirs as they were."""

  def same(name: str, edit: Edit) -> bool:
    under = isinstance(edit, Replacement) and edit.underlies
    return under and np.array_equal(edit.value, np.asarray(base[name], np.float32))  # type: ignore[union-attr]

  return dataclasses.replace(adapter, edits=tuple(one for one in adapter.edits if not same(*one)))


def _difference(base: Params, merged: Params, adapters: Sequence[StackedAdapter]) -> dict[str, np.ndarray]:
  """What became of every edited matrix; a head that is tied again is its embedding."""
  found = {}
  for name in edited(adapters):
    after = merged[name] if name in merged else merged[EMBEDDING].T
    found[name] = np.asarray(after, np.float32) - np.asarray(base[name], np.float32)
  return found


def _concatenated(adapters: Sequence[StackedAdapter]) -> dict[str, LowRank]:
  """Factors side by side: their product is the sum of the products."""
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
  """The same as `low_rank` of the product, by way of matrices no larger than its rank."""
  (qa, ra), (qb, rb) = np.linalg.qr(edit.a), np.linalg.qr(edit.b.T)
  inner = low_rank(ra @ rb.T, rank=rank)
  return LowRank(a=qa @ inner.a, b=inner.b @ qb.T, scale=1.0)
