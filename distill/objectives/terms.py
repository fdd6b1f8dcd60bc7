"""The table of built-in terms, and the functions that read a recipe's terms and check them."""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from distill.configuration import read
from distill.errors import InputError
from distill.objectives.balance import Balance
from distill.objectives.cross_entropy import CrossEntropy
from distill.objectives.divergence_terms import (
  AlphaBeta,
  DecoupledKl,
  ForwardKl,
  Jsd,
  ReverseKl,
  SkewKl,
  SkewReverseKl,
  TotalVariation,
)
from distill.objectives.hidden import Hidden
from distill.objectives.isolated import BlockOutput, MixerOutput
from distill.objectives.relations import Relations
from distill.objectives.taid import Taid
from distill.objectives.term import Setting, Term
from distill.objectives.z_loss import ZLoss
from distill.schedules import schedule

TERMS: Mapping[str, type[Term]] = {
  "forward_kl": ForwardKl,
  "reverse_kl": ReverseKl,
  "jsd": Jsd,
  "skew_kl": SkewKl,
  "skew_reverse_kl": SkewReverseKl,
  "total_variation": TotalVariation,
  "alpha_beta": AlphaBeta,
  "dkd": DecoupledKl,
  "taid": Taid,
  "cross_entropy": CrossEntropy,
  "z_loss": ZLoss,
  "balance": Balance,
  "hidden": Hidden,
  "mixer_output": MixerOutput,
  "block_output": BlockOutput,
  "relations": Relations,
}


def read_terms(specs: Sequence[Any], *, key: str) -> tuple[Term, ...]:
  """Reads the terms of a stage; `bind_terms` then checks them against the models.

  Args:
    specs: One mapping for each term: its kind, a name in `TERMS` or 'package.module:Class', and its options.
    key: Place of the terms in the recipe; error messages begin with it.

  Raises:
    InputError: A kind or option is unknown, or a value is wrong.
  """
  if not specs:
    raise InputError(f"{key}: the list is empty, but a stage needs at least one term; add a dict with a kind")
  return tuple(_read(spec, key=f"{key}[{index}]") for index, spec in enumerate(specs))


def bind_terms(terms: Sequence[Term], setting: Setting, *, key: str) -> tuple[Term, ...]:
  """Returns the terms of a stage, checked against its models, with model-dependent defaults filled in.

  Args:
    terms: All terms of the stage.
    setting: The stage and its models.
    key: Place of the terms in the recipe; error messages begin with it.

  Raises:
    InputError: A term does not fit the stage or the models.
  """
  setting = dataclasses.replace(setting, has_reference=any(term.reference for term in terms))
  for index, term in enumerate(terms):
    schedule(term.weight, key=f"{key}[{index}].weight", steps=setting.steps)
  return tuple(term.bind(setting, key=f"{key}[{index}]") for index, term in enumerate(terms))


def _read(spec: Any, *, key: str) -> Term:
  if not isinstance(spec, Mapping):
    raise InputError(f"{key}: {spec!r} is not a term; give a dict with a kind")
  kind, options = spec.get("kind"), {name: value for name, value in spec.items() if name != "kind"}
  if isinstance(kind, str) and ":" in kind:
    return read(_imported(kind, key=f"{key}.kind"), options, key=key)
  if not isinstance(kind, str) or kind not in TERMS:
    raise InputError(
      f"{key}.kind: unknown term {kind!r}; use one of {', '.join(TERMS)}, or 'package.module:Class' for one of your own"
    )
  return read(TERMS[kind], options, key=key)


def _imported(kind: str, *, key: str) -> type:
  """Returns the class that `kind` names as 'package.module:Class', after a check that it can be used as a term.

  Raises:
    InputError: The import fails, or the class does not implement `Term`; the message begins with `key`.
  """
  module, _, name = kind.partition(":")
  try:
    found = getattr(importlib.import_module(module), name)
  except Exception as error:  # The module is the user's: it may fail in any way.
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    raise InputError(
      f"{key}: {kind!r} cannot be imported ({reason}); correct it, or put its folder on PYTHONPATH"
    ) from error
  faults = [] if isinstance(found, type) else ["is not a class"]
  faults += [] if dataclasses.is_dataclass(found) else ["is not a dataclass"]
  faults += [f"has no {name}" for name in _MEMBERS if not hasattr(found, name)]
  if faults:
    raise InputError(
      f"{key}: {kind!r} cannot be used as a term: it {faults[0]}; implement Term of distill/objectives/term.py"
    )
  return found


_MEMBERS = ("kind", *(name for name in vars(Term) if not name.startswith("_")))
