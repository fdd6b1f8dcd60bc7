"""Times one accelerator: losses over a large vocabulary, and a step of an 8B-shaped teacher and a 1.2B student.

    python -m tools.bench_device [--parts=losses,step] [--repeats=10] [--batch=8] [--length=2048] [--peak=989]
      [--out=PATH] [--small]

Losses: forward KL and JSD(0.5) of hidden states [8192, 4096] under heads of 128,256 columns, in bf16, with gradients by
the student's hidden states and head. Printed are milliseconds, and the peak GiB of the compiled program, with its
inputs.

Step: a training step of Llama shapes with random weights. The teacher is in bf16; the student is in float32 with bf16
operands, and trained by AdamW. Printed are tokens per second, and the models' FLOP/s as a share of --peak, the device's
TFLOP/s in bf16 (989 for an H100 or H200). The models' FLOPs are 6 per parameter and token of the student, 2 of the
teacher, and those of causal attention; recomputation does not count.

--small shrinks all shapes, to try the script on a CPU. No accelerator has been measured yet. Expected of one H200:
losses within 60 ms and 9 GiB, the step above 45 % of the peak.
"""

import argparse
import datetime
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distill.checkpoints import hf_config
from distill.models.decoder import Decoder
from distill.parallel.mesh import make_mesh
from distill.teachers.live import LiveTeacher
from distill.training.memory import needed
from distill.tree import Params
from tools.workers.losses import function
from tools.workers.step import Steps

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 5e5, "vocab_size": 128256}
TEACHER = {
  **_LLAMA,
  "hidden_size": 4096,
  "intermediate_size": 14336,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "num_key_value_heads": 8,
  "head_dim": 128,
  "tie_word_embeddings": False,
}
STUDENT = {
  **_LLAMA,
  "hidden_size": 2048,
  "intermediate_size": 8192,
  "num_hidden_layers": 16,
  "num_attention_heads": 32,
  "num_key_value_heads": 8,
  "head_dim": 64,
  "tie_word_embeddings": True,
}
_SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
_SMALL_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
_WARM = 2


def main() -> None:
  """Prints one line for each loss and for the step; with --out also writes the figures as JSON."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--parts", type=lambda text: text.split(","), default=["losses", "step"])
  parser.add_argument("--peak", type=float, default=989.0)
  parser.add_argument("--small", action="store_true")
  parser.add_argument("--out", type=pathlib.Path)
  for name, default in dict(repeats=10, batch=8, length=2048).items():
    parser.add_argument(f"--{name}", type=int, default=default)
  options = parser.parse_args()
  device = jax.devices()[0]
  found: dict[str, Any] = {
    "date": datetime.date.today().isoformat(),
    "device": device.device_kind,
    "jax": jax.__version__,
    "settings": {key: value for key, value in vars(options).items() if key != "out"},
  }
  if "losses" in options.parts:
    found["losses"] = [_loss(name, options) for name in ("forward_kl", "jsd")]
  if "step" in options.parts:
    found["step"] = _step(options)
  if options.out:
    options.out.write_text(json.dumps(found, indent=1) + "\n")


def _loss(name: str, options: argparse.Namespace) -> dict[str, Any]:
  """Measures the time and memory of one chunked loss, forward_kl or jsd, with its gradients."""
  tokens, width, vocab = (256, 64, 512) if options.small else (8192, 4096, 128256)
  settings = {"loss": name, "form": "chunked", "vocab": vocab}
  keys = jax.random.split(jax.random.key(0), 4)
  draw = jax.jit(functools.partial(jax.random.normal, dtype=jnp.bfloat16), static_argnums=1)
  given = [draw(key, shape) for key, shape in zip(keys, ((tokens, width), (width, vocab)) * 2, strict=True)]
  given = [x * (width**-0.5 if len(x) == width else 1.0) for x in given]
  step = jax.jit(jax.value_and_grad(function(settings), argnums=(0, 1))).lower(*given).compile()
  seconds = _median(lambda: step(*given), repeats=options.repeats)
  row = {"loss": name, "milliseconds": 1e3 * seconds, "gib": needed(step) / 2**30}
  print(f"{name:<12} {row['milliseconds']:9.1f} ms {row['gib']:7.2f} GiB", flush=True)
  return row


def _step(options: argparse.Namespace) -> dict[str, Any]:
  """Measures the speed of a training step, and the share of the device's peak FLOP/s that the models reach."""
  shapes = ({**one, **(_SMALL | _SMALL_HEADS if options.small else {})} for one in (STUDENT, TEACHER))
  student, teacher = (Decoder(hf_config.config_from_dict(one, where="config.json")) for one in shapes)
  mesh = make_mesh()
  params = _random(student, mesh, dtype=jnp.float32, seed=0)
  theirs = _random(teacher, mesh, dtype=jnp.bfloat16, seed=1)
  batch, length = (2, 32) if options.small else (options.batch, options.length)
  flops = batch * length * (3 * _flops(student, length) + _flops(teacher, length))
  settings = {
    "batch": batch,
    "length": length,
    "vocab": student.config.vocab_size,
    "learning_rate": 1e-5,
    "dtype": "bfloat16",
  }
  steps = Steps(
    student, params=params, teacher=LiveTeacher(decoder=teacher, params=theirs), mesh=mesh, settings=settings
  )
  del params
  print("step: compiling", file=sys.stderr, flush=True)
  seconds = _median(lambda: steps.advance(1), repeats=options.repeats)
  row = {
    "seconds": seconds,
    "tokens_per_second": batch * length / seconds,
    "tflops": flops / seconds / 1e12,
    "share_of_peak": flops / seconds / 1e12 / options.peak,
    "gib": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30,
  }
  print(
    f"step         {1e3 * seconds:9.1f} ms {row['gib']:7.2f} GiB {row['tokens_per_second']:,.0f} tokens/s "
    f"{row['tflops']:.1f} TFLOP/s, {100 * row['share_of_peak']:.1f} % of peak",
    flush=True,
  )
  return row


def _random(decoder: Decoder, mesh: jax.sharding.Mesh, *, dtype: Any, seed: int) -> Params:
  """Returns random parameters in `dtype`, created directly on the devices."""

  def made(key):
    return {name: x.astype(dtype) for name, x in decoder.init(key).items()}

  return jax.jit(made, out_shardings=decoder.shardings(mesh))(jax.random.key(seed))


def _flops(decoder: Decoder, length: int) -> float:
  """Returns the forward FLOPs per token in rows of `length` tokens: two per matrix parameter, plus causal attention."""
  config = decoder.config
  sizes = {name: x.size for name, x in decoder.abstract().items()}
  table = 0 if config.tie_embeddings else sizes["embed.table"]
  # Scores and mixed values, each 2 · T · width of the queries, half of them masked.
  attention = sum(2 * length * layer.mixer.num_heads * layer.mixer.head_dim for layer in config.layers)
  return 2 * (sum(sizes.values()) - table) + attention


def _median(run: Callable[[], Any], *, repeats: int) -> float:
  times = []
  for turn in range(_WARM + repeats):
    start = time.perf_counter()
    jax.block_until_ready(run())
    if turn >= _WARM:
      times.append(time.perf_counter() - start)
  return statistics.median(times)


if __name__ == "__main__":
  main()
