"""Two processes of one jax program, on the CPU."""

import os
import socket
import subprocess
import sys

START = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
RANK = int(sys.argv[2])
jax.distributed.initialize(sys.argv[1], 2, RANK, initialization_timeout=60)
"""


def two(program: str, *arguments: object, devices: int = 1) -> list[tuple[int, str, str]]:
  """(exit code, output, errors) of each; the program finds its RANK, and its arguments from sys.argv[3] on."""
  flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  running = [
    subprocess.Popen(
      [sys.executable, "-c", START + program, address, str(rank), *map(str, arguments)],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for rank in range(2)
  ]
  done = [process.communicate(timeout=120) for process in running]
  return [(process.returncode, out, err) for process, (out, err) in zip(running, done, strict=True)]
