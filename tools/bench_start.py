"""Measures the KL of untrained, initialised students from the embedded teacher; prints the tables of docs/starting.md.

python -m tools.bench_start [--rows=64] [--only=depth]

The teacher is that of the demonstration, with its three adapters. Importance is measured on rows of its training text.
The KL, in nats per token, is measured on other rows of that text (the adapters' subjects) and on held-out general text.
Each line also has the KL of a fresh student, one with random parameters. Expected: in the first line of each of the
first two tables, the KL is at most half of the fresh student's. Most of the time is compilation, about half a minute
per student on two busy cores.
"""

import argparse
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax

from distill.adapters.loading import load_merged
from distill.adapters.stack import read_adapters, stack_of
from distill.checkpoints import hf_config
from distill.data.calibration import sample
from distill.data.sources import open_source
from distill.data.store import build_store
from distill.data.tokenizer import load_tokenizer
from distill.demo import ROOT
from distill.evaluation.starting_kl import starting_kl
from distill.initialise.importance import measure_importance
from distill.initialise.transfer import from_teacher
from distill.models.decoder import Decoder
from distill.models.host_view import HostView, place
from distill.parallel.mesh import MeshConfig, make_mesh

_SKILLS = ("book", "category", "class")
_ALL = tuple(range(11))
_SHARED: dict[str, Any] = {
  "vocab_size": 4096,
  "hidden_size": 192,
  "intermediate_size": 512,
  "num_hidden_layers": 11,
  "num_attention_heads": 3,
  "num_key_value_heads": 3,
  "head_dim": 64,
  "rms_norm_eps": 1e-5,
  "tie_word_embeddings": True,
}
_LINEAR = {
  "qwen3_5_text": {
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 3,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
  },
  "bamba": {
    "mamba_n_heads": 3,
    "mamba_d_head": 64,
    "mamba_d_state": 64,
    "mamba_n_groups": 3,
    "mamba_expand": 1,
  },
}

Case = tuple[str, dict[str, Any], tuple[int, ...] | str]


def _dense(name: str, layers: tuple[int, ...] | str = _ALL, **changes) -> Case:
  return name, {"model_type": "llama", **_SHARED, **changes}, layers


def _hybrid(name: str, family: str, layers: tuple[int, ...], full: tuple[int, ...]) -> Case:
  values = {"model_type": family, **_SHARED, **_LINEAR[family], "num_hidden_layers": len(layers)}
  kinds = ["full_attention" if i in full else "linear_attention" for i in range(len(layers))]
  if family == "bamba":
    del values["head_dim"]
    return name, {**values, "attn_layer_indices": list(full)}, layers
  return name, {**values, "layer_types": kinds}, layers


def _cases() -> dict[str, list[Case]]:
  depth = []
  for count in (9, 8, 6, 4, 3, 2):
    spread = tuple(round(10 * i / (count - 1)) for i in range(count))
    depth += [_dense(f"{count} layers, spread evenly", spread, num_hidden_layers=count)]
    depth += [_dense(f"{count} layers, by importance", "importance", num_hidden_layers=count)]
  width = [
    _dense("MLP 384 of 512", intermediate_size=384),
    _dense("2 of 3 heads", num_attention_heads=2, num_key_value_heads=2),
    _dense("width 160 of 192", hidden_size=160),
    _dense("width 160, MLP 384", hidden_size=160, intermediate_size=384),
    _dense(
      "width 160, MLP 384, 2 heads",
      hidden_size=160,
      intermediate_size=384,
      num_attention_heads=2,
      num_key_value_heads=2,
    ),
    _dense("width 160, MLP 384, 9 layers", "importance", hidden_size=160, intermediate_size=384, num_hidden_layers=9),
    _dense("width 128", hidden_size=128),
    _dense("width 112", hidden_size=112),
    _dense("width 96", hidden_size=96),
    _dense("one key head under 3 heads", num_key_value_heads=1),
  ]
  mixers = []
  for what, family in (("gated delta", "qwen3_5_text"), ("Mamba-2", "bamba")):
    mixers += [
      _hybrid(f"{what}, all but layers 3 and 7", family, _ALL, (3, 7)),
      _hybrid(f"{what}, layers 0 3 6, attention 10", family, (0, 3, 6, 10), (3,)),
    ]
  return {"depth": depth, "width": width, "mixers": mixers}


def main() -> None:
  """Measures the teacher once, then every student of every table, and prints the tables."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", type=int, default=64)
  parser.add_argument("--only", default="")
  arguments = parser.parse_args()
  mesh, directory = make_mesh(MeshConfig(data=1, fsdp=-1)), ROOT / "teacher"
  adapters = read_adapters(
    stack_of([str(ROOT / "adapters" / name) for name in _SKILLS]), config=hf_config.read_config(directory)
  )
  config, params = load_merged(directory, adapters=adapters, mesh=mesh)
  teacher = Decoder(config)
  measured, seen = [], []
  with tempfile.TemporaryDirectory() as scratch:
    for name in ("general", *_SKILLS):
      rows = _rows(name, 2 * arguments.rows // 4, directory, scratch)
      measured += rows[: len(rows) // 2]
      seen += rows[len(rows) // 2 :]
    heldout = _rows("heldout", arguments.rows, directory, scratch)
  importance = measure_importance(teacher, params, batches=measured, mesh=mesh)
  print("1 - cos of layers:", " ".join(f"{one:.3f}" for one in importance.layers))
  for title, cases in _cases().items():
    if arguments.only in ("", title):
      print(f"\n| {title} | parameters | KL, adapters' text | fresh | KL, held-out text | fresh |\n|{'---|' * 6}")
      for line in _table(cases, teacher, params, importance, (seen, heldout), mesh):
        print(line, flush=True)


def _rows(name: str, count: int, teacher: pathlib.Path, scratch: str) -> list:
  source = open_source({"kind": "jsonl", "path": str(ROOT / "text" / f"{name}.jsonl")}, key=name)
  store = build_store(source, tokenizer=load_tokenizer(str(teacher)), length=128, directory=scratch)
  return sample(store, rows=count, batch_size=16, seed=0)


def _table(cases, teacher, params, importance, texts, mesh) -> Iterator[str]:
  for name, values, layers in cases:
    student = Decoder(hf_config.config_from_dict(values, where=name))
    fresh = jax.jit(student.init)(jax.random.key(0))
    start = from_teacher(
      dict(HostView(student, fresh, mesh=mesh)),
      config=student.config,
      teacher=HostView(teacher, params, mesh=mesh),
      teacher_config=teacher.config,
      layers=layers,
      importance=importance,
    )
    both = {"started": (student, place(student, start.params, mesh=mesh)), "fresh": (student, fresh)}
    found = [starting_kl(both, teacher=(teacher, params), batches=text, mesh=mesh) for text in texts]
    size = sum(x.size for x in fresh.values())
    cells = [f"{one[which]:.3f}" for one in found for which in ("started", "fresh")]
    yield f"| {name} | {size:,} | {' | '.join(cells)} |"


if __name__ == "__main__":
  main()
