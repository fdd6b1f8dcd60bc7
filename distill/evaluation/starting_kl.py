"""Measures the KL divergence of initialised students from their teacher, before any training."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from distill.evaluation.model import run
from distill.losses.chunked import chunked_divergence
from distill.losses.divergences import forward_kl
from distill.models.decoder import Decoder
from distill.parallel.mesh import batch_sharding
from distill.types import Batch, ModelOutput

DecoderAndParams = tuple[Decoder, Mapping[str, Any]]


def starting_kl(
  students: Mapping[str, DecoderAndParams], *, teacher: DecoderAndParams, batches: Iterable[Batch], mesh: Mesh
) -> dict[str, float]:
  """Computes the mean KL(teacher ‖ student) over the predicted tokens of `batches`, with float32 operands.

  Args:
    students: Each student's decoder and stacked parameters on `mesh`, by name.
    teacher: The teacher's decoder and stacked parameters on `mesh`.
    batches: Rows of text, for example those that importance was measured on when a student was initialised.
    mesh: Devices over which the rows are sharded.

  Returns:
    For each student's name, its KL in nats a token.
  """
  total, count = dict.fromkeys(students, 0.0), 0.0
  for batch in batches:
    batch = jax.device_put(batch, batch_sharding(mesh))
    target = run(teacher[0], dict(teacher[1]), batch)
    count += float(jnp.sum(batch.loss_mask))
    for name, (decoder, params) in students.items():
      total[name] += float(_divergence(run(decoder, dict(params), batch), target, batch))
  return {name: value / max(count, 1.0) for name, value in total.items()}


@jax.jit
def _divergence(mine: ModelOutput, target: ModelOutput, batch: Batch) -> Float[Array, ""]:
  return chunked_divergence(
    forward_kl,
    hidden=mine.hidden.reshape(-1, mine.hidden.shape[-1]),
    readout=mine.readout,
    target=target.hidden.reshape(-1, target.hidden.shape[-1]),
    teacher_readout=target.readout,
    mask=batch.loss_mask.reshape(-1),
  )
