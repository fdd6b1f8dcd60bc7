"""How far students are from their teacher before training."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distill.losses.chunked import chunked_divergence
from distill.losses.divergences import forward_kl
from distill.models.decoder import Decoder
from distill.parallel.mesh import batch_sharding, replicated
from distill.types import Batch, ModelOutput


def starting_kl(
  decoder: Decoder,
  students: Mapping[str, Mapping[str, Any]],
  *,
  teacher: tuple[Decoder, Mapping[str, Any]],
  batches: Iterable[Batch],
  mesh: Mesh,
) -> dict[str, float]:
  """KL(teacher ‖ student) in nats a token over all that is learnt in `batches`, with float32 operands.

  Args:
    decoder: The students' architecture.
    students: Stacked parameters on `mesh` by name.
    teacher: Its decoder and stacked parameters.
    batches: Rows; they may be those that a student was made from, or others.
    mesh: Where the rows are spread.
  """
  model, weights = teacher

  def output(one: Decoder, params: Mapping[str, Any], batch: Batch) -> ModelOutput:
    return one.apply(params, tokens=batch.tokens, segments=batch.segments, positions=batch.positions, dtype=jnp.float32)

  @jax.jit
  def taught(params, batch):
    return output(model, params, batch)

  @jax.jit
  def divergence(params, target, batch):
    mine = output(decoder, params, batch)
    return chunked_divergence(
      forward_kl,
      hidden=mine.hidden.reshape(-1, mine.hidden.shape[-1]),
      readout=mine.readout,
      target=target.hidden.reshape(-1, target.hidden.shape[-1]),
      teacher_readout=target.readout,
      mask=batch.loss_mask.reshape(-1),
    )

  total, count = dict.fromkeys(students, 0.0), 0.0
  for batch in batches:
    batch = jax.device_put(batch, batch_sharding(mesh))
    target = taught(dict(weights), batch)
    count += float(jnp.sum(batch.loss_mask))
    for name, params in students.items():
      total[name] += float(jax.device_put(divergence(dict(params), target, batch), replicated(mesh)))
  return {name: value / max(count, 1.0) for name, value in total.items()}
