"""Builds tiny inputs of losses, and terms that are checked against tiny models (`Term.bind`)."""

import jax.numpy as jnp
import numpy as np

from distill.models.config import AttentionConfig, DecoderConfig, LayerConfig, MlpConfig, RopeConfig
from distill.objectives.objective import counts, loss_sums
from distill.objectives.term import LossContext, LossInputs, Setting
from distill.objectives.terms import bind_terms, read_terms
from distill.types import Batch, DenseSignal, ModelOutput, Readout

KEY = "config.stages.a.terms"
LAYER = LayerConfig(
  mixer=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, rope=RopeConfig(theta=1e4)), mlp=MlpConfig(width=24)
)


def config(depth, *, width=16, layer=LAYER):
  return DecoderConfig(family="llama", vocab_size=31, width=width, layers=(layer,) * depth)


def setting(student=1, teacher=3, *, steps=10, **changes):
  """Returns a `Setting`: a stage of `steps` steps, a student of `student` layers and a teacher of `teacher` layers."""
  models = {"student": config(student), "teacher": config(teacher)}
  return Setting(**{"steps": steps, **models, "teacher_depth": teacher, "teacher_width": 16, **changes})


def bound(*specs, **changes):
  """Returns the terms of recipe dicts, bound to `setting(**changes)`."""
  return bind_terms(read_terms(specs, key=KEY), setting(**changes), key=KEY)


def batch(rows):
  """Returns rows of two documents and two positions of padding; a document's last token has no target."""
  segments = jnp.asarray(np.repeat([[1, 2, 0]], [4, 3, 2], axis=1).repeat(rows, 0))
  mask = jnp.asarray(np.asarray([[1, 1, 1, 0, 1, 1, 0, 0, 0]], np.float32).repeat(rows, 0))
  tokens = jnp.asarray(np.random.default_rng(1).integers(0, 11, (rows, 9)))
  return Batch(tokens=tokens, segments=segments, positions=segments, loss_mask=mask)


def inputs(rows):
  """Returns random outputs of a student of width 6 and a teacher of width 5, and a projector for the pair (0, 2)."""
  rng = np.random.default_rng(0)

  def array(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  return LossInputs(
    batch=batch(rows),
    output=ModelOutput(
      hidden=array(rows, 9, 6), layers={0: array(rows, 9, 6)}, readout=Readout(kernel=array(6, 11), vocab_size=11)
    ),
    signal=DenseSignal(
      hidden=array(rows, 9, 5), layers={2: array(rows, 9, 5)}, readout=Readout(kernel=array(5, 11), vocab_size=11)
    ),
    params={"0_2.kernel": array(6, 5)},
  )


def context(given, *, step=0, steps=10, states=None):
  """Returns the `LossContext` after `step` steps; the counts are those of the batch in `given`, a `LossInputs`."""
  return LossContext(step=jnp.int32(step), steps=steps, totals=counts(given.batch), states=states or {})


def sums(terms, given, **changes):
  """Returns (loss, mean of each term by name) of the batch in `given`, a `LossInputs`."""
  return loss_sums(terms, given, context=context(given, **changes))
