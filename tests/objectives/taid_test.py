import jax.numpy as jnp
import numpy as np

from distill.objectives.objective import initial_states, next_states
from tests.objectives.problem import bound, context, inputs, sums


def test_the_taid_target_moves_from_near_the_student_to_the_teacher():
  given, terms = inputs(2), bound({"kind": "taid"}, {"kind": "forward_kl"}, steps=4)
  states, shares = initial_states(terms), []
  _, first = sums(terms, given, states=states, steps=4)
  assert first["0_taid"] < first["1_forward_kl"]
  for step in range(4):
    states = next_states(terms, context=context(given, step=step, steps=4, states=states), parts=first)
    shares.append(float(states["0"]["t"]))
  np.testing.assert_allclose(shares, [0.55, 0.7, 0.85, 1.0], atol=1e-3)
  _, last = sums(terms, given, states=states, steps=4)
  np.testing.assert_allclose(last["0_taid"], last["1_forward_kl"], rtol=1e-4)


def test_the_taid_target_runs_ahead_of_the_linear_schedule_while_the_loss_falls():
  given, terms = inputs(1), bound({"kind": "taid", "alpha": 0.5}, steps=1000)
  states = initial_states(terms)
  for step, value in enumerate((2.0, 1.0)):
    parts = {"0_taid": jnp.float32(value)}
    states = next_states(terms, context=context(given, step=step, steps=1000, states=states), parts=parts)
  assert states["0"]["t"] > 0.6 and states["0"]["momentum"] > 0
