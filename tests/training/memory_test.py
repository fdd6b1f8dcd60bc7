import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.models.config import AttentionConfig, DecoderConfig, LayerConfig, MlpConfig, RopeConfig
from distill.models.decoder import Decoder
from distill.models.remat import REMAT_POLICIES
from distill.training import memory
from distill.training.memory import first_that_fits, needed

SOFT = LayerConfig(
  mixer=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, rope=RopeConfig(theta=1e4)), mlp=MlpConfig(width=48)
)
MODEL = Decoder(DecoderConfig(family="llama", vocab_size=31, width=16, layers=(SOFT,) * 6))
TOKENS = jnp.zeros((4, 64), jnp.int32)


def steps():
  """Returns a model's jitted gradient function for each remat policy, and a list of the policies compiled so far."""
  compiled = []

  def of(remat):
    def loss(params):
      compiled.append(remat)
      positions = jnp.broadcast_to(jnp.arange(64), TOKENS.shape)
      output = MODEL.apply(
        params, tokens=TOKENS, segments=TOKENS + 1, positions=positions, dtype=jnp.float32, remat=remat
      )
      return jnp.sum(jnp.square(output.hidden))

    return jax.jit(jax.grad(loss))

  return [of(remat) for remat in REMAT_POLICIES], compiled


def test_remat_of_layers_needs_less_memory_than_of_projections_and_gives_the_same_gradient():
  params = MODEL.init(jax.random.key(0))
  both, _ = steps()
  sizes = [needed(step.lower(params).compile()) for step in both]
  assert sizes[1] < 0.8 * sizes[0]
  for one, other in zip(*(jax.tree.leaves(step(params)) for step in both), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_the_first_remat_policy_whose_training_step_fits_into_memory_runs_and_is_compiled_once(monkeypatch):
  params = MODEL.init(jax.random.key(0))
  both, compiled = steps()
  said = []
  step = first_that_fits(both, report=said.append)
  step(params), step(params)
  assert compiled == ["projections"] and not said
  monkeypatch.setattr(memory, "device_memory", lambda: needed(both[0].lower(params).compile()) - 1)
  both, compiled = steps()
  step = first_that_fits(both, report=said.append)
  step(params), step(params)
  assert compiled == ["projections", "layers"]
  assert len(said) == 1 and "recomputed" in said[0]


class Lowered:
  """A lowered step whose compiler ends with an error."""

  def __init__(self, message):
    self._message = message

  def compile(self):
    raise jax.errors.JaxRuntimeError(self._message)


def test_a_compiler_that_runs_out_of_device_memory_says_how_much_the_step_needs():
  said = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory. Used 198.25G of 95.74G hbm."
  assert memory.compile_within(Lowered(said)) == (None, 198.25 * 2**30)
  assert memory.compile_within(Lowered("RESOURCE_EXHAUSTED: out of memory")) == (None, math.inf)


def test_any_other_error_of_the_compiler_is_raised():
  with pytest.raises(jax.errors.JaxRuntimeError, match="UNIMPLEMENTED"):
    memory.compile_within(Lowered("UNIMPLEMENTED: no such operation"))


def test_a_step_that_the_compiler_refuses_for_memory_is_replaced_by_the_next_one():
  class Step:
    def __call__(self, x):
      raise AssertionError("a step that does not fit must not run")

    def lower(self, *arguments):
      return Lowered("RESOURCE_EXHAUSTED: Used 2.00G of 1.00G hbm")

  said = []
  step = first_that_fits([Step(), lambda x: x + 1], report=said.append)
  assert step(1) == 2
  assert "needs 2.0 GiB" in said[0]
