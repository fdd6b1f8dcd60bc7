"""Times distill's losses over a vocabulary, and the same losses in plain jax, for tools/bench_loss.py."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill.losses.chunked import chunked_losses
from distill.losses.divergences import forward_kl, jsd
from distill.losses.token_losses import divergence_loss
from distill.types import Readout
from tools.workers.arrays import arrays
from tools.workers.serve import available, forget_peak, peak, resident, serve

_DIVERGENCES = {"forward_kl": forward_kl, "jsd": lambda p, q: jsd(p, q, beta=0.5)}


def _plain_kl(p, q):
  return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def _plain_jsd(p, q):
  m = jnp.logaddexp(p, q) - jnp.log(2.0)
  return 0.5 * (_plain_kl(p, m) + _plain_kl(q, m))


# As one writes them down.
_PLAIN = {"forward_kl": _plain_kl, "jsd": _plain_jsd}


def main() -> None:
  """Runs the worker: times the loss once for each line on stdin."""
  serve(_prepare)


def function(settings: Mapping[str, Any]) -> Callable[..., Any]:
  """Returns the loss that `settings` names: (hidden, kernel, teacher's hidden, teacher's kernel) -> mean over tokens.

  Args:
    settings: "loss" (forward_kl or jsd), "form" (plain for plain jax, else distill's chunked loss), and "vocab".
  """
  divergence, vocab = _DIVERGENCES[settings["loss"]], settings["vocab"]

  def mean(hidden, kernel, teacher_hidden, teacher_kernel):
    student, teacher = (Readout(kernel=one, vocab_size=vocab) for one in (kernel, teacher_kernel))
    if settings["form"] == "plain":
      p, q = (jax.nn.log_softmax(x) for x in (teacher.logits(teacher_hidden), student.logits(hidden)))
      return jnp.mean(_PLAIN[settings["loss"]](p, q))
    loss = divergence_loss(divergence, weight=1 / len(hidden))
    return chunked_losses(
      [loss],
      hidden=hidden,
      readout=student,
      target=teacher_hidden,
      teacher_readout=teacher,
      mask=jnp.ones(len(hidden)),
    )[0]

  return mean


def _prepare(settings: Mapping[str, Any]) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
  """Compiles the loss with its gradients; returns (first message to bench_loss.py, function that times a round)."""
  step = jax.jit(jax.value_and_grad(function(settings), argnums=(0, 1)))
  width, vocab = settings["width"], settings["vocab"]

  def compiled(tokens: int):
    shapes = ((tokens, width), (width, vocab)) * 2
    return step.lower(*(jax.ShapeDtypeStruct(shape, settings["dtype"]) for shape in shapes)).compile()

  step, twice = compiled(settings["tokens"]), compiled(2 * settings["tokens"])
  sizes = [one.memory_analysis().temp_size_in_bytes for one in (step, twice)]
  told = {"temporaries": sizes[0], "temporaries_twice": sizes[1]}
  if sizes[0] > available():
    return {**told, "fits": False}, dict
  given = [jnp.asarray(x, settings["dtype"]) for x in arrays(settings)]
  value, grads = jax.block_until_ready(step(*given))
  norms = [float(np.linalg.norm(np.asarray(x, np.float64))) for x in grads]
  del grads
  before = resident()

  def run() -> dict[str, Any]:
    forget_peak()
    start = time.perf_counter()
    jax.block_until_ready(step(*given))
    return {"seconds": time.perf_counter() - start, "bytes": peak() - before}

  return {**told, "fits": True, "value": float(value), "norms": norms}, run


if __name__ == "__main__":
  main()
