"""Measures loading a large checkpoint: peak host memory beyond the device arrays, and bytes read by each process.

python tools/bench_load.py [--gigabytes=6] [--dtype=float32] [--scratch=DIR]

Makes a random checkpoint of several files, loads it onto eight virtual CPU devices, first in one process and then in
two, and deletes it. The device arrays of a CPU are in host memory too, so their size is subtracted from the peak.
"""

import argparse
import json
import math
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np

DEVICES = 8
WIDTH, MLP, VOCAB = 2048, 5632, 32_000


def make(directory: pathlib.Path, *, size: int) -> int:
  """Writes a random float32 Llama of about `size` bytes; returns the exact number of bytes."""
  from distill.checkpoints import hf_config
  from distill.files import safetensors_files
  from distill.files.tensors import Pending

  layer = 4 * (4 * WIDTH * WIDTH + 3 * WIDTH * MLP + 2 * WIDTH)
  config = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": max(1, round((size - 8 * VOCAB * WIDTH) / layer)),
    "num_attention_heads": 16,
  }
  (directory / "config.json").write_text(json.dumps(config))
  decoder = hf_config.read_config(directory)
  shapes, rng, tensors = hf_config.shapes(decoder), np.random.default_rng(0), {}
  for entry in hf_config.name_table(decoder):
    shape = shapes[entry.ours][:: -1 if entry.form == "transpose" else 1]
    tensors[entry.theirs] = Pending(
      shape=shape, dtype=np.dtype(np.float32), make=lambda shape=shape: rng.random(shape, np.float32)
    )
  safetensors_files.write(directory, tensors, stem="model", max_file_bytes=10**9)
  return sum(4 * math.prod(shape) for shape in shapes.values())


def load(directory: pathlib.Path, *, dtype: str, rank: int, processes: int, address: str) -> None:
  """Loads the checkpoint in this process; prints its memory, bytes read from disk and seconds as JSON."""
  import jax

  if processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, processes, rank)
  from distill.checkpoints import sharded
  from distill.parallel.mesh import MeshConfig, make_mesh

  mesh, sizes = make_mesh(MeshConfig(data=1, fsdp=-1)), []
  before = _memory("VmRSS")
  start = time.perf_counter()
  _, params = sharded.load(directory, mesh=mesh, dtype=dtype, report=sizes.append)
  jax.block_until_ready(params)
  seconds = time.perf_counter() - start
  held = sum(shard.data.nbytes for x in params.values() for shard in x.addressable_shards)
  peak = _memory("VmHWM")
  print(json.dumps({"read": sum(sizes), "held": held, "peak": peak, "before": before, "seconds": seconds}))


def _memory(key: str) -> int:
  """Returns a memory figure of this process in bytes, by its key in /proc."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def measure(directory: pathlib.Path, *, dtype: str, processes: int) -> list[dict[str, float]]:
  """Loads the checkpoint in `processes` processes that share the eight devices; returns the figures of each process."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  flags = f"--xla_force_host_platform_device_count={DEVICES // processes}"
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
  command = [sys.executable, __file__, f"--load={directory}", f"--dtype={dtype}", f"--processes={processes}"]
  running = [
    subprocess.Popen([*command, f"--rank={i}", f"--address={address}"], env=environment, stdout=subprocess.PIPE)
    for i in range(processes)
  ]
  outputs = [process.communicate()[0] for process in running]
  assert not any(process.returncode for process in running), outputs
  lines = [next(line for line in output.splitlines() if line.startswith(b"{")) for output in outputs]
  return [json.loads(line) for line in lines]


def main() -> None:
  """Prints memory and bytes read, one line for each process."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--gigabytes", type=float, default=6)
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--scratch", type=pathlib.Path)
  parser.add_argument("--load", type=pathlib.Path, help=argparse.SUPPRESS)
  for name, default in (("rank", 0), ("processes", 1)):
    parser.add_argument(f"--{name}", type=int, default=default, help=argparse.SUPPRESS)
  parser.add_argument("--address", default="", help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.load:
    load(
      options.load,
      dtype=options.dtype,
      rank=options.rank,
      processes=options.processes,
      address=options.address,
    )
    return
  with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
    directory = pathlib.Path(scratch)
    size = make(directory, size=round(options.gigabytes * 1e9))
    files = len(list(directory.glob("*.safetensors")))
    print(f"checkpoint: {size / 1e9:.2f} GB of float32 in {files} files, onto {DEVICES} devices as {options.dtype}")
    for processes in (1, 2):
      for rank, found in enumerate(measure(directory, dtype=options.dtype, processes=processes)):
        print(
          f"process {rank} of {processes}: read {found['read'] / 1e9:.2f} GB ({found['read'] / size:.1%}) "
          f"in {found['seconds']:.1f} s; peak {found['peak'] / 1e9:.2f} GB, device arrays {found['held'] / 1e9:.2f}, "
          f"beyond them {(found['peak'] - found['held']) / 1e9:.2f} ({found['before'] / 1e9:.2f} before loading)"
        )


if __name__ == "__main__":
  main()
