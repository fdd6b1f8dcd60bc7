"""Starts processes that run jax on the CPU, alone or as two processes of one distributed program."""

import os
import socket
import subprocess
import sys

# The variable holds what the caller gave: processes that tests start inherit XLA_FLAGS as the tests changed them.
GIVEN_FLAGS = os.environ.setdefault("DISTILL_TESTS_XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
# Tests compile far longer than they compute: LLVM does not optimise, and XLA emits LLVM IR without the fusion
# emitters, whose MLIR passes take half of the time to compile.
CHEAP_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"

START = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
RANK = int(sys.argv[2])
jax.distributed.initialize(sys.argv[1], 2, RANK, initialization_timeout=60)
"""


def environment(*, devices: int = 1, cheap: bool = True) -> dict[str, str]:
  """Returns environment variables for a process with virtual CPU devices.

  A `cheap` process compiles quickly and runs slowly. The caller's XLA_FLAGS are retained.
  """
  flags = [
    GIVEN_FLAGS,
    f"--xla_force_host_platform_device_count={devices}",
    # Eight devices share few cores: one may wait long for the others.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    CHEAP_FLAGS if cheap else "",
  ]
  return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}


def two(program: str, *arguments: object, devices: int = 1) -> list[tuple[int, str, str]]:
  """Runs a program as two jax processes; returns (exit code, stdout, stderr) of each.

  The program finds its number, 0 or 1, in RANK, and `arguments` in sys.argv[3:].
  """
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  running = [
    subprocess.Popen(
      [sys.executable, "-c", START + program, address, str(rank), *map(str, arguments)],
      env={**os.environ, **environment(devices=devices)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for rank in range(2)
  ]
  done = [process.communicate(timeout=120) for process in running]
  return [(process.returncode, out, err) for process, (out, err) in zip(running, done, strict=True)]
