"""Times the JSD over a vocabulary of Liger (chunked) and of TRL, in torch on the CPU, for tools/bench_loss.py.

Runs in the environment .peers/torch, which tools/bench_peers.sh creates.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss
from trl.experimental.gkd.gkd_trainer import GKDTrainer

from tools.workers.arrays import arrays
from tools.workers.serve import available, forget_peak, peak, resident, serve


def main() -> None:
  """Runs the worker: times the loss once for each line on stdin."""
  serve(_prepare)


def _prepare(settings: Mapping[str, Any]) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
  # TRL holds about 17 arrays of all logits at once.
  logits = settings["tokens"] * settings["vocab"] * 4
  if settings["form"] == "trl" and 17 * logits > available():
    return {"fits": False}, dict
  dtype = getattr(torch, settings["dtype"])
  hidden, kernel, teacher_hidden, teacher_kernel = (torch.from_numpy(x) for x in arrays(settings))
  # torch keeps a head as [V, D].
  mine = hidden.to(dtype).requires_grad_(), kernel.T.contiguous().to(dtype).requires_grad_()
  theirs = teacher_hidden.to(dtype), teacher_kernel.T.contiguous().to(dtype)
  del hidden, kernel, teacher_hidden, teacher_kernel
  labels = torch.zeros(len(mine[0]), dtype=torch.long)
  chunked = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False)

  def loss() -> torch.Tensor:
    if settings["form"] == "liger":
      return chunked(*mine, *theirs, labels)
    logits = [(x @ head.T)[None] for x, head in (mine, theirs)]
    return GKDTrainer.generalized_jsd_loss(*logits, beta=0.5) / len(mine[0])

  def step() -> float:
    for x in mine:
      x.grad = None
    value = loss()
    value.backward()
    return value.item()

  value = step()
  norms = [torch.linalg.vector_norm(x.grad, dtype=torch.float64).item() for x in mine]
  for x in mine:
    x.grad = None
  before = resident()

  def run() -> dict[str, Any]:
    forget_peak()
    start = time.perf_counter()
    step()
    return {"seconds": time.perf_counter() - start, "bytes": peak() - before}

  return {"fits": True, "value": value, "norms": norms}, run


if __name__ == "__main__":
  main()
