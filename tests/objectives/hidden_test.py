import jax
import jax.numpy as jnp
import numpy as np

from distill.objectives.hidden import projected
from tests.objectives.problem import bound, inputs, setting, sums


def test_projectors_map_to_the_teachers_width_and_start_as_the_identity_if_widths_agree():
  narrow = setting(2, 3, teacher_width=5)
  (term,) = bound({"kind": "hidden", "pairs": ((0, 1), (1, 2))}, student=2, teacher_width=5)
  params = term.init_params(narrow, key=jax.random.key(0))
  assert {name: x.shape for name, x in params.items()} == {"0_1.kernel": (16, 5), "1_2.kernel": (16, 5)}
  same = term.init_params(setting(2, 3), key=jax.random.key(0))
  np.testing.assert_array_equal(same["0_1.kernel"], np.eye(16))


def test_no_gradient_of_the_hidden_loss_flows_into_the_teacher():
  given, terms = inputs(1), bound({"kind": "hidden", "pairs": ((0, 2),)})

  def loss(teacher, kernel):
    given.signal.layers[2] = teacher
    given.params["0_2.kernel"] = kernel
    return sums(terms, given)[0]

  teacher, kernel = jax.grad(loss, argnums=(0, 1))(given.signal.layers[2], given.params["0_2.kernel"])
  assert not np.any(teacher) and np.any(kernel)


def test_a_projector_does_not_mix_rows_or_positions():
  kernel = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
  x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 6)), jnp.float32)
  np.testing.assert_allclose(projected(x, kernel), x @ kernel, rtol=1e-5, atol=1e-6)
  assert projected(x, None) is x
