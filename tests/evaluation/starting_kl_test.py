"""The KL of students before training equals a NumPy computation, and is zero for a copy of the teacher."""

import jax
import jax.numpy as jnp
import numpy as np

from distill.evaluation.starting_kl import starting_kl
from distill.models.config import AttentionConfig, DecoderConfig, LayerConfig
from distill.models.decoder import Decoder
from distill.parallel.mesh import MeshConfig, make_mesh
from distill.types import Batch

LAYER = LayerConfig(mixer=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, rope=None), mlp=None)
DECODER = Decoder(DecoderConfig(family="llama", vocab_size=60, width=16, layers=(LAYER,)))


def test_the_kl_of_an_initialised_student_is_the_mean_over_predicted_tokens():
  teacher, other = ({n: 5 * x for n, x in DECODER.init(jax.random.key(seed)).items()} for seed in (0, 1))
  tokens = np.random.default_rng(0).integers(0, 60, (8, 6)).astype(np.int32)
  ones, mask = np.ones_like(tokens), (np.arange(6) < 4) * np.ones((8, 1), np.float32)
  positions = np.broadcast_to(np.arange(6, dtype=np.int32), tokens.shape)
  batch = Batch(tokens=tokens, segments=ones, positions=positions, loss_mask=mask)
  students = {"copy": (DECODER, teacher), "other": (DECODER, other)}
  got = starting_kl(students, teacher=(DECODER, teacher), batches=[batch, batch], mesh=make_mesh(MeshConfig(data=8)))

  def logs(params):
    inputs = {name: jnp.asarray(getattr(batch, name)) for name in ("tokens", "segments", "positions")}
    output = DECODER.apply(params, **inputs, dtype=jnp.float32)
    return np.asarray(jax.nn.log_softmax(output.readout.logits(output.hidden)), np.float64)

  p, q = logs(teacher), logs(other)
  np.testing.assert_allclose(got["other"], (mask * (np.exp(p) * (p - q)).sum(-1)).sum() / mask.sum(), rtol=1e-4)
  assert abs(got["copy"]) < 1e-5
