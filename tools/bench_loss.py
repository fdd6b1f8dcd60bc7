"""Chunked against plain forward KL from hidden states: time and compiled temporaries, side by side in one run.

python tools/bench_loss.py [--tokens=4096] [--vocab=32768] [--width=256]
"""

import argparse
import time

import jax
import jax.numpy as jnp

from distill.losses.chunked import chunked_divergence
from distill.losses.divergences import forward_kl
from distill.types import Readout


def chunked(hidden, readout, teacher_hidden, teacher_readout, mask):
  """Forward KL as training computes it."""
  return chunked_divergence(
    forward_kl, hidden=hidden, readout=readout, target=teacher_hidden, teacher_readout=teacher_readout, mask=mask
  )


def plain(hidden, readout, teacher_hidden, teacher_readout, mask):
  """The same sum with the logits of all tokens at once, as one writes it down."""
  q, p = (jax.nn.log_softmax(x) for x in (readout.logits(hidden), teacher_readout.logits(teacher_hidden)))
  return jnp.sum(mask * jnp.sum(jnp.exp(p) * (p - q), axis=-1))


def main() -> None:
  """Prints one line a form, and the ratios."""
  parser = argparse.ArgumentParser(description=__doc__)
  for name, default in (("tokens", 4096), ("vocab", 32768), ("width", 256), ("repeats", 3)):
    parser.add_argument(f"--{name}", type=int, default=default)
  options = parser.parse_args()
  keys = jax.random.split(jax.random.key(0), 4)
  hidden = [jax.random.normal(key, (options.tokens, options.width)) for key in keys[:2]]
  kernels = [jax.random.normal(key, (options.width, options.vocab)) * options.width**-0.5 for key in keys[2:]]
  student, teacher = (Readout(kernel=kernel, vocab_size=options.vocab) for kernel in kernels)
  arguments = (hidden[0], student, hidden[1], teacher, jnp.ones(options.tokens))
  figures = {}
  for name, loss in (("chunked", chunked), ("plain", plain)):
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile()
    jax.block_until_ready(step(*arguments))
    start = time.perf_counter()
    for _ in range(options.repeats):
      jax.block_until_ready(step(*arguments))
    seconds = (time.perf_counter() - start) / options.repeats
    figures[name] = seconds, step.memory_analysis().temp_size_in_bytes / 2**20
    print(f"{name:<8} {seconds:6.2f} s   {figures[name][1]:8.0f} MiB of temporaries")
  time_ratio, memory_ratio = (figures["chunked"][i] / figures["plain"][i] for i in (0, 1))
  print(f"chunked / plain: time {time_ratio:.2f}, memory {memory_ratio:.3f}")


if __name__ == "__main__":
  main()
