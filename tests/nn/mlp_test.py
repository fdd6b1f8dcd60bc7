import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.nn.mlp import MlpConfig
from distill.nn.param import Init
from tests.kernels.precision import assert_equal_up_to_rounding


@pytest.mark.parametrize("gated", [True, False])
def test_an_mlp_applies_its_activation_to_the_gate_projection_or_to_up_if_it_has_no_gate(gated):
  mlp = MlpConfig(width=7, act="relu2", gated=gated).build(Init(jax.random.key(0)), width=5)
  x = np.random.default_rng(0).normal(size=(2, 3, 5))
  up, down = (np.asarray(part.kernel[...], np.float64) for part in (mlp.up, mlp.down))
  activated = x @ (np.asarray(mlp.gate.kernel[...], np.float64) if gated else up)
  expected = (np.maximum(activated, 0.0) ** 2 * (x @ up if gated else 1.0)) @ down
  assert_equal_up_to_rounding(mlp(jnp.asarray(x, jnp.float32), dtype=jnp.float32), expected, roundings=8 * 12)
