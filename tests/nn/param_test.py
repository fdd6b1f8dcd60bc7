import jax
import jax.numpy as jnp

from distill.nn.param import Init, log_rate, normal, time_step

SHAPE, AXES = (4, 3), ("embed", "mlp")


def test_initial_values_do_not_depend_on_earlier_draws_and_differ_between_repeated_layers():
  init = Init(jax.random.key(0)).child("mlp")
  up = init.param("up", shape=SHAPE, axes=AXES, init=normal(1.0))
  init.param("down", shape=(3, 4), axes=("mlp", "embed"), init=normal(1.0))
  again = init.param("up", shape=SHAPE, axes=AXES, init=normal(1.0))
  assert (up[...] == again[...]).all()
  stacked = Init(jax.random.key(0), repeats=3).child("mlp").param("up", shape=SHAPE, axes=AXES, init=normal(1.0))
  assert stacked[...].shape == (3, *SHAPE) and stacked.get_metadata()["axes"] == ("layers", *AXES)
  assert not (stacked[...][0] == stacked[...][1]).all()


def test_decay_rates_and_time_steps_are_drawn_as_in_the_mamba_2_paper():
  rates = jnp.exp(log_rate(1.0)(jax.random.key(0), (500,)))
  steps = jax.nn.softplus(time_step(jax.random.key(1), (500,)))
  assert 1.0 <= rates.min() < 1.2 and 15.8 < rates.max() <= 16.0
  assert 0.00099 <= steps.min() < 0.0011 and 0.09 < steps.max() <= 0.1001
  assert abs(float(jnp.log(steps).mean()) - jnp.log(0.01)) < 0.2
