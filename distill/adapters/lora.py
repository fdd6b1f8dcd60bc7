"""Trainable LoRA adapters: factors of stacked kernels, merged into the kernels inside the jitted training step."""

import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from distill.adapters.edits import LowRank
from distill.errors import InputError
from distill.models.decoder import Decoder
from distill.parallel.mesh import sharding
from distill.tree import Params


def init(decoder: Decoder, *, targets: str, rank: int, key: Key[Array, ""]) -> Params:
  """Initialises LoRA factors for all kernels that `targets` matches.

  Args:
    decoder: The decoder whose kernels are adapted.
    targets: Regex for canonical kernel names. Layers whose kernels are stacked must all match, or none of them.
    rank: Rank R of the factors.
    key: Random key; each kernel folds in its name.

  Returns:
    For each stacked kernel [L, I, O] of L layers, `{kernel}.lora_a` [L, I, R], uniform in ±1 / sqrt(I), and
    `{kernel}.lora_b` [L, R, O], zero.

  Raises:
    InputError: The regex matches no kernel, or only some of the layers that are stacked.
  """
  params: Params = {}
  for name, x in decoder.abstract().items():
    if not name.startswith("groups.") or not name.endswith(".kernel") or len(x.shape) != 3 or ".conv." in name:
      continue
    chosen = [bool(re.fullmatch(targets, one)) for one in decoder.canonical(name)]
    if any(chosen) != all(chosen):
      raise InputError(
        f"student.adapters.targets: {targets!r} matches only some of the layers stacked in {name}; match all or none"
      )
    if not all(chosen):
      continue
    layers, rows, columns = x.shape
    bound = rows**-0.5
    one = jax.random.fold_in(key, zlib.crc32(name.encode()))
    params[f"{name}.lora_a"] = jax.random.uniform(one, (layers, rows, rank), jnp.float32, -bound, bound)
    params[f"{name}.lora_b"] = jnp.zeros((layers, rank, columns), jnp.float32)
  if not params:
    raise InputError(
      f"student.adapters.targets: {targets!r} matches no kernel of the student; try r'layers.*mixer.[qv].kernel'"
    )
  return params


def shardings(decoder: Decoder, adapters: Mapping[str, Any], *, mesh: Any) -> Params:
  """Returns name -> sharding of every LoRA factor: the side of size I or O is sharded as in the kernel [L, I, O].

  Args:
    decoder: The decoder whose kernels are adapted.
    adapters: Factors under stacked names, `….lora_a` and `….lora_b`, or their shapes.
    mesh: The mesh that the kernels are sharded over.
  """
  axes = decoder.axes()
  found = {}
  for name, x in adapters.items():
    kernel, half = name.rsplit(".", 1)
    layers, rows, columns = axes[kernel]
    found[name] = sharding(mesh, x.shape, (layers, rows, "rank") if half == "lora_a" else (layers, "rank", columns))
  return found


def apply(params: Mapping[str, Any], *, adapters: Mapping[str, Any], scale: float) -> Params:
  """Returns the stacked parameters, with scale * A @ B added to every kernel that has LoRA factors.

  Args:
    params: Stacked parameters of the base.
    adapters: Factors under stacked names, `….lora_a` [L, I, R] and `….lora_b` [L, R, O].
    scale: Multiplies every product A @ B.
  """
  merged = dict(params)
  for name in adapters:
    if name.endswith(".lora_a"):
      kernel = name.removesuffix(".lora_a")
      delta = jnp.matmul(adapters[name], adapters[f"{kernel}.lora_b"], preferred_element_type=jnp.float32)
      merged[kernel] = params[kernel] + scale * delta
  return merged


def factors(decoder: Decoder, adapters: Mapping[str, Any], *, scale: float) -> dict[str, LowRank]:
  """Returns canonical kernel name -> LoRA factors of one layer, ready for `write_adapter`.

  Args:
    decoder: The decoder whose kernels are adapted.
    adapters: Factors under stacked names.
    scale: Multiplies every product A @ B.
  """
  flat = decoder.unstack({name: np.asarray(x) for name, x in adapters.items()})
  kernels = [name.removesuffix(".lora_a") for name in flat if name.endswith(".lora_a")]
  return {one: LowRank(a=flat[f"{one}.lora_a"], b=flat[f"{one}.lora_b"], scale=scale) for one in kernels}
