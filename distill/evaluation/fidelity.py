"""How close a student's next-token distribution is to its teacher's on held-out text."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from distill.data.store import TokenStore
from distill.evaluation.model import Model
from distill.losses.chunked import chunk_tokens
from distill.losses.divergences import forward_kl
from distill.losses.partitions import dense_log_probs
from distill.losses.token_losses import cross_entropy
from distill.types import Batch, ModelOutput

_ROWS = 16


def fidelity(*, student: Model, teacher: Model, base: Model, store: TokenStore) -> dict[str, float]:
  """Held-out figures over every row of `store`.

  Returns:
    kl: KL(teacher ‖ student) at temperature 1, nats a token.
    top1_agreement: Share of tokens whose likeliest successor is the same.
    bits_per_byte_{base,teacher,student}: NLL / (ln 2 · UTF-8 bytes); the first token of a row's document is given.
    tokens: Predicted tokens.
  """
  models = {"student": student, "teacher": teacher, "base": base}

  @jax.jit
  def sums(params, batch: Batch):
    outputs = {
      name: model.output(params[name], tokens=batch.tokens, segments=batch.segments, positions=batch.positions)
      for name, model in models.items()
    }
    return _sums(outputs, batch)

  params = {name: model.params for name, model in models.items()}
  total: dict[str, float] = {}
  for start in range(0, store.rows, _ROWS):
    rows = np.arange(start, start + _ROWS)
    fields = store.read(np.minimum(rows, store.rows - 1))
    fields["loss_mask"] = fields["loss_mask"] * (rows < store.rows)[:, None]
    for name, value in jax.device_get(sums(params, Batch(**fields))).items():
      total[name] = total.get(name, 0.0) + float(value)
  count, scale = total.pop("tokens"), math.log(2) * store.meta["bytes"]
  bits = {f"bits_per_byte_{name}": total[f"nll_{name}"] / scale for name in ("base", "teacher", "student")}
  return {"kl": total["kl"] / count, "top1_agreement": total["agreement"] / count, **bits, "tokens": count}


def _sums(outputs: dict[str, ModelOutput], batch: Batch) -> dict[str, jax.Array]:
  labels = jnp.roll(batch.tokens, -1, axis=1).reshape(-1)
  mask = batch.loss_mask.reshape(-1)
  hidden = {name: output.hidden.reshape(-1, output.hidden.shape[-1]) for name, output in outputs.items()}
  vocab = outputs["student"].readout.vocab_size
  size = math.gcd(labels.shape[0], 2 ** int(math.log2(chunk_tokens(vocab, tokens=labels.shape[0]))))

  def one(chunk):
    hidden, labels, mask = chunk
    logits = {name: outputs[name].readout.logits(x)[:, :vocab] for name, x in hidden.items()}
    agreement = jnp.argmax(logits["student"], -1) == jnp.argmax(logits["teacher"], -1)
    values = {f"nll_{name}": cross_entropy(x, labels) for name, x in logits.items()}
    pair = dense_log_probs(logits["student"], logits["teacher"], temperature=1.0)
    values |= {"kl": forward_kl(*pair), "agreement": agreement}
    return {name: jnp.sum(mask * value) for name, value in values.items()} | {"tokens": jnp.sum(mask)}

  chunks = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), (hidden, labels, mask))
  return jax.tree.map(jnp.sum, jax.lax.map(one, chunks))
