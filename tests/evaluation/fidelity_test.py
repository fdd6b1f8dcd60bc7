"""Fidelity on held-out text equals a computation in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.data.sources import open_source
from distill.data.store import build_store
from distill.data.tokenizer import load_tokenizer
from distill.evaluation.fidelity import fidelity
from distill.evaluation.model import EvaluatedModel, run
from distill.models.config import AttentionConfig, DecoderConfig, LayerConfig
from distill.models.decoder import Decoder
from distill.types import Batch

LAYER = LayerConfig(mixer=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, rope=None), mlp=None)
DECODER = Decoder(DecoderConfig(family="llama", vocab_size=304, width=16, layers=(LAYER,)))


def model(role, seed):
  params = {name: 5 * x for name, x in DECODER.init(jax.random.key(seed)).items()}
  return EvaluatedModel(role=role, name=f"model {seed}", decoder=DECODER, params=params)


@pytest.fixture(scope="module")
def heldout(tmp_path_factory, text_file, tokenizer_dir):
  source = open_source({"kind": "jsonl", "path": str(text_file)}, key="data")
  directory = tmp_path_factory.mktemp("store")
  return build_store(source, tokenizer=load_tokenizer(tokenizer_dir), length=32, directory=directory)


def test_bits_per_byte_kl_and_top1_agreement_equal_a_numpy_computation(heldout):
  teacher, student, control = models = [model("teacher", 0), model("student", 1), model("control", 0)]
  first, row, same = fidelity(models, store=heldout)
  fields = heldout.read(np.arange(heldout.rows))
  batch = Batch(**{name: jnp.asarray(x) for name, x in fields.items()})

  def logs(model):
    output = run(DECODER, model.params, batch)
    z = np.asarray(output.readout.logits(output.hidden), np.float64)
    return z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)

  p, q, mask = logs(teacher), logs(student), fields["loss_mask"]
  labels = np.roll(fields["tokens"], -1, axis=1)[..., None]
  np.testing.assert_allclose(row.kl, (mask * (np.exp(p) * (p - q)).sum(-1)).sum() / mask.sum(), rtol=1e-4)
  agreement = (mask * (p.argmax(-1) == q.argmax(-1))).sum() / mask.sum()
  np.testing.assert_allclose(row.top1_agreement, agreement, atol=2 / mask.sum())
  bits = -(mask * np.take_along_axis(q, labels, -1)[..., 0]).sum() / np.log(2) / heldout.meta["bytes"]
  np.testing.assert_allclose(row.bits_per_byte, bits, rtol=1e-5)
  assert row.tokens == mask.sum() and (row.role, row.name) == ("student", "model 1")
  assert first.kl is None and first.bits_per_byte == same.bits_per_byte
  assert same.top1_agreement == 1.0 and abs(same.kl) < 1e-5
