"""Benchmarks the forward and backward pass of mixers for several row lengths: seconds, and temporary memory.

python -m tools.bench_mixers [--width=256] [--lengths=512,1024,…] [--dtype=float32] [--rows=…] [--json=FILE]

All mixers have one width, and include their projections. Rows of transformers use its pure torch code, which runs where
its custom kernels are not installed. Rows that end in `alone` are the delta rule without projections. A program that
needs more than --memory GiB of temporary memory is compiled but not run.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distill.kernels.gated_delta import gated_delta_rule
from distill.nn.attention import Attention, AttentionConfig
from distill.nn.gated_delta import GatedDelta, GatedDeltaConfig
from distill.nn.mamba2 import Mamba2, Mamba2Config
from distill.nn.param import Init
from distill.nn.rope import RopeConfig

_HEAD = 64
# (a step to time, MiB of its temporaries or None where nobody tells)
Step = tuple[Callable[[], Any], float | None]


def attention(width: int) -> nnx.Module:
  """Returns a causal softmax attention mixer of `width`, with heads of 64 dimensions."""
  heads = width // _HEAD
  config = AttentionConfig(num_heads=heads, num_kv_heads=heads, head_dim=_HEAD, rope=RopeConfig())
  return Attention(Init(jax.random.key(0)), config=config, width=width, norm_eps=1e-6, norm_offset=0.0)


def gated_delta(width: int) -> nnx.Module:
  """Returns a gated delta rule mixer of `width`, with as many heads as `attention` has."""
  heads = width // _HEAD
  config = GatedDeltaConfig(num_key_heads=heads, num_value_heads=heads, key_head_dim=_HEAD, value_head_dim=_HEAD)
  return GatedDelta(Init(jax.random.key(0)), config=config, width=width, norm_eps=1e-6)


def mamba2(width: int) -> nnx.Module:
  """Returns a Mamba-2 mixer of `width`, with as many heads as `attention` has and one group per head."""
  heads = width // _HEAD
  config = Mamba2Config(num_heads=heads, head_dim=_HEAD, state_size=_HEAD, num_groups=heads)
  return Mamba2(Init(jax.random.key(0)), config=config, width=width, norm_eps=1e-6)


# A mixer that is added here is measured.
MIXERS: Mapping[str, Callable[[int], nnx.Module]] = {
  "attention": attention,
  "gated delta": gated_delta,
  "mamba2": mamba2,
}


def _compiled(loss: Callable[..., jax.Array], *arguments: Any) -> Step:
  step = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(arguments))))).lower(*arguments).compile()
  return lambda: jax.block_until_ready(step(*arguments)), step.memory_analysis().temp_size_in_bytes / 2**20


def _mixer(name: str, options: argparse.Namespace, length: int) -> Step:
  graph, state = nnx.split(MIXERS[name](options.width))
  x = jax.random.normal(jax.random.key(1), (1, length, options.width))
  row = {"segments": jnp.ones((1, length), jnp.int32), "positions": jnp.arange(length)[None]}

  def loss(state: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(nnx.merge(graph, state)(x, **row, dtype=jnp.dtype(options.dtype))))

  return _compiled(loss, state, x)


def _inputs(width: int, length: int) -> dict[str, jax.Array]:
  """Returns random inputs of the delta rule: unit q and k, v [1, length, heads, 64]; gates [1, length, heads]."""
  heads = width // _HEAD
  keys = jax.random.split(jax.random.key(1), 5)
  q, k, v = (jax.random.normal(key, (1, length, heads, _HEAD)) for key in keys[:3])
  q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
  gates = (jax.random.normal(key, (1, length, heads)) for key in keys[3:])
  log_decay, beta = -0.1 * jax.nn.softplus(next(gates)), jax.nn.sigmoid(next(gates))
  return {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta}


def _rule(options: argparse.Namespace, length: int) -> Step:
  segments = jnp.ones((1, length), jnp.int32)

  def loss(inputs: dict[str, jax.Array]) -> jax.Array:
    return jnp.mean(jnp.square(gated_delta_rule(**inputs, segments=segments)[0]))

  return _compiled(loss, _inputs(options.width, length))


def _torch_rule(options: argparse.Namespace, length: int) -> Step:
  import numpy as np
  import torch
  from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

  names = {"q": "query", "k": "key", "v": "value", "log_decay": "g", "beta": "beta"}
  inputs = {
    names[name]: torch.tensor(np.asarray(x), requires_grad=True) for name, x in _inputs(options.width, length).items()
  }

  def step() -> None:
    out, _ = torch_chunk_gated_delta_rule(**inputs)
    out.square().mean().backward()

  return step, None


def _torch_space(options: argparse.Namespace, length: int) -> Step:
  import torch
  import transformers
  from transformers.models.mamba2.modeling_mamba2 import Mamba2 as Theirs

  heads = options.width // _HEAD
  config = transformers.Mamba2Config(
    hidden_size=options.width, num_heads=heads, head_dim=_HEAD, state_size=_HEAD, n_groups=heads, expand=1
  )
  mixer, x = Theirs(config, layer_idx=0), torch.randn(1, length, options.width, requires_grad=True)
  return lambda: mixer(x).square().mean().backward(), None


ROWS: Mapping[str, Callable[[argparse.Namespace, int], Step]] = {
  **{name: (lambda options, length, name=name: _mixer(name, options, length)) for name in MIXERS},
  "gated delta alone": _rule,
  "transformers' gated delta alone": _torch_rule,
  "transformers' mamba2": _torch_space,
}


def _measure(name: str, options: argparse.Namespace, length: int) -> dict[str, Any]:
  step, memory = ROWS[name](options, length)
  found: dict[str, Any] = {"row": name, "length": length, "seconds": None, "temporaries_mib": memory}
  if memory is None or memory <= options.memory * 1024:
    step()
    times = []
    for _ in range(options.repeats):
      start = time.perf_counter()
      step()
      times.append(time.perf_counter() - start)
    found["seconds"] = min(times)
  return found


def _line(one: Mapping[str, Any]) -> str:
  seconds = "not run" if one["seconds"] is None else f"{one['seconds']:8.3f} s"
  memory = "" if one["temporaries_mib"] is None else f"{one['temporaries_mib']:8.0f} MiB"
  return f"{one['row']:<32} {one['length']:>6} {seconds:>10} {memory:>12}"


def main() -> None:
  """Prints each measurement, then a table of mixers by length."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  for name, default in dict(width=256, repeats=3, memory=8).items():
    parser.add_argument(f"--{name}", type=int, default=default)
  parser.add_argument("--lengths", default="512,1024,2048,4096,8192,16384")
  parser.add_argument("--rows", default=",".join(ROWS))
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--json", type=pathlib.Path)
  options = parser.parse_args()
  lengths, rows = [int(x) for x in options.lengths.split(",")], options.rows.split(",")
  figures = []
  for length in lengths:
    for name in rows:
      figures.append(_measure(name, options, length))
      print(_line(figures[-1]), flush=True)
  print(f"\nseconds / MiB of temporaries, width {options.width}, {options.dtype}")
  print("| row | " + " | ".join(map(str, lengths)) + " |\n" + "|---" * (len(lengths) + 1) + "|")
  for name in rows:
    cells = []
    for one in (x for x in figures if x["row"] == name):
      seconds = "—" if one["seconds"] is None else f"{one['seconds']:.3f}"
      cells.append(seconds if one["temporaries_mib"] is None else f"{seconds} / {one['temporaries_mib']:.0f}")
    print(f"| {name} | " + " | ".join(cells) + " |")
  if options.json:
    options.json.write_text(json.dumps({"width": options.width, "dtype": options.dtype, "figures": figures}, indent=2))


if __name__ == "__main__":
  main()
