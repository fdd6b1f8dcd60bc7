"""Measures models on held-out text: bits per byte, and KL and top-1 agreement with the teacher."""

import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from distill.data.store import TokenStore
from distill.evaluation.model import BASE, TEACHER, EvaluatedModel, run
from distill.evaluation.report import FidelityRow
from distill.losses.chunked import chunk_tokens
from distill.losses.divergences import forward_kl
from distill.losses.token_losses import cross_entropy, dense_log_probs
from distill.types import Batch, ModelOutput

_ROWS = 16  # Rows of the store that the devices run at once.


def fidelity(models: Sequence[EvaluatedModel], *, store: TokenStore) -> tuple[FidelityRow, ...]:
  """Measures models on all rows of a token store, and returns one report row for each model.

  KL and top-1 agreement compare a model with the teacher. They are None for the base and the teacher, and for all
  models if none is the teacher.

  Args:
    models: Models that share a tokenizer.
    store: Tokenised held-out text.
  """
  teacher = next((model for model in models if model.role == TEACHER), None)
  # Adapters may have added tokens to the teacher's vocabulary, which the others lack.
  vocab = min(model.decoder.config.vocab_size for model in models)
  totals: list[dict[str, float]] = [{} for _ in models]
  for start in range(0, store.rows, _ROWS):
    rows = np.arange(start, start + _ROWS)
    fields = store.read(np.minimum(rows, store.rows - 1))
    fields["loss_mask"] = fields["loss_mask"] * (rows < store.rows)[:, None]
    batch = jax.tree.map(jnp.asarray, Batch(**fields))
    target = None if teacher is None else run(teacher.decoder, teacher.params, batch)
    for model, total in zip(models, totals, strict=True):
      output = target if model is teacher else run(model.decoder, model.params, batch)
      sums = _sums(output, None if model.role in (BASE, TEACHER) else target, batch, vocab=vocab)
      for name, value in jax.device_get(sums).items():
        total[name] = total.get(name, 0.0) + float(value)
  return tuple(_row(model, total, bytes=store.meta["bytes"]) for model, total in zip(models, totals, strict=True))


def _row(model: EvaluatedModel, total: Mapping[str, float], *, bytes: int) -> FidelityRow:
  count = total["tokens"]
  return FidelityRow(
    role=model.role,
    name=model.name,
    tokens=count,
    bits_per_byte=total["nll"] / (math.log(2) * bytes),
    kl=total["kl"] / count if "kl" in total else None,
    top1_agreement=total["agreement"] / count if "agreement" in total else None,
  )


@functools.partial(jax.jit, static_argnames="vocab")
def _sums(output: ModelOutput, target: ModelOutput | None, batch: Batch, *, vocab: int) -> dict[str, jax.Array]:
  """Returns sums, by name, over the positions of a batch whose next token counts in the loss.

  `nll` sums the negative log-likelihood; `tokens` is the number of these positions. If `target`, the teacher's output,
  is given, `kl` sums KL(teacher ‖ model), and `agreement` is the number of positions with equal argmax.
  """
  labels = jnp.roll(batch.tokens, -1, axis=1).reshape(-1)
  mask = batch.loss_mask.reshape(-1)
  outputs = [one for one in (output, target) if one is not None]
  hidden = [one.hidden.reshape(-1, one.hidden.shape[-1]) for one in outputs]
  size = math.gcd(labels.shape[0], 2 ** int(math.log2(chunk_tokens(vocab, tokens=labels.shape[0]))))

  def one(chunk):
    hidden, labels, mask = chunk
    logits = [output.readout.logits(x)[:, :vocab] for output, x in zip(outputs, hidden, strict=True)]
    values = {"nll": cross_entropy(logits[0], labels)}
    if target is not None:
      values["kl"] = forward_kl(*dense_log_probs(*logits, temperature=1.0))
      agree = jnp.argmax(logits[0], -1) == jnp.argmax(logits[1], -1)
      values["agreement"] = agree.astype(jnp.float32)
    return {name: jnp.sum(mask * value) for name, value in values.items()} | {"tokens": jnp.sum(mask)}

  # A chunk at a time: the logits of all tokens would not fit into memory.
  chunks = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), (hidden, labels, mask))
  return jax.tree.map(jnp.sum, jax.lax.map(one, chunks))
