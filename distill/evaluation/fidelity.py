"""Next-token distributions on held-out text: how likely the text is, and how near they are to the teacher's."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from distill.data.store import TokenStore
from distill.evaluation.model import BASE, TEACHER, EvaluatedModel
from distill.evaluation.report import FidelityRow
from distill.losses.chunked import chunk_tokens
from distill.losses.divergences import forward_kl
from distill.losses.partitions import dense_log_probs
from distill.losses.token_losses import cross_entropy
from distill.types import Batch, ModelOutput

_ROWS = 16  # Rows of the store that the devices run at once.


def fidelity(models: Sequence[EvaluatedModel], *, store: TokenStore) -> tuple[FidelityRow, ...]:
  """Measures models on every row of a token store; those of other roles than base and teacher against the teacher.

  Args:
    models: Models that share a tokenizer.
    store: Text, with its tokenizer's token ids.
  """
  roles = [model.role for model in models]
  teacher = roles.index(TEACHER) if TEACHER in roles else None
  compared = [i for i, role in enumerate(roles) if role not in (BASE, TEACHER) and teacher is not None]

  @jax.jit
  def sums(params, batch: Batch):
    outputs = [
      model.output(one, tokens=batch.tokens, segments=batch.segments, positions=batch.positions)
      for model, one in zip(models, params, strict=True)
    ]
    return _sums(outputs, batch, teacher=teacher, compared=compared)

  params = [model.params for model in models]
  total: dict[str, float] = {}
  for start in range(0, store.rows, _ROWS):
    rows = np.arange(start, start + _ROWS)
    fields = store.read(np.minimum(rows, store.rows - 1))
    fields["loss_mask"] = fields["loss_mask"] * (rows < store.rows)[:, None]
    for name, value in jax.device_get(sums(params, Batch(**fields))).items():
      total[name] = total.get(name, 0.0) + float(value)
  count, scale = total["tokens"], math.log(2) * store.meta["bytes"]
  return tuple(
    FidelityRow(
      role=model.role,
      name=model.name,
      tokens=count,
      bits_per_byte=total[f"nll_{i}"] / scale,
      kl=total[f"kl_{i}"] / count if i in compared else None,
      top1_agreement=total[f"agreement_{i}"] / count if i in compared else None,
    )
    for i, model in enumerate(models)
  )


def _sums(
  outputs: Sequence[ModelOutput], batch: Batch, *, teacher: int | None, compared: Sequence[int]
) -> dict[str, jax.Array]:
  """Sums over the tokens of a batch: `nll_i` of every model, `kl_i` and `agreement_i` of those compared, `tokens`."""
  labels = jnp.roll(batch.tokens, -1, axis=1).reshape(-1)
  mask = batch.loss_mask.reshape(-1)
  hidden = [output.hidden.reshape(-1, output.hidden.shape[-1]) for output in outputs]
  # Adapters may have added tokens to the teacher's vocabulary, which the others lack.
  vocab = min(output.readout.vocab_size for output in outputs)
  size = math.gcd(labels.shape[0], 2 ** int(math.log2(chunk_tokens(vocab, tokens=labels.shape[0]))))

  def one(chunk):
    hidden, labels, mask = chunk
    logits = [output.readout.logits(x)[:, :vocab] for output, x in zip(outputs, hidden, strict=True)]
    values = {f"nll_{i}": cross_entropy(x, labels) for i, x in enumerate(logits)}
    for i in compared:
      pair = dense_log_probs(logits[i], logits[teacher], temperature=1.0)
      values[f"kl_{i}"] = forward_kl(*pair)
      values[f"agreement_{i}"] = jnp.argmax(logits[i], -1) == jnp.argmax(logits[teacher], -1)
    return {name: jnp.sum(mask * value) for name, value in values.items()} | {"tokens": jnp.sum(mask)}

  # A chunk at a time: the logits of all tokens would not fit into memory.
  chunks = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), (hidden, labels, mask))
  return jax.tree.map(jnp.sum, jax.lax.map(one, chunks))
